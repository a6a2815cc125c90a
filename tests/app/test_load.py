"""Many clients at once: every image equals the serial one, and clients over the limit can try again."""

import re
import subprocess
import sys
import threading
import time

import psutil
import pytest
from gradio_client import Client, handle_file
from PIL import Image
from tests.weights import use_weights, write_tiny

from nexus_adapters.app.models import Models
from nexus_adapters.app.page import build
from nexus_adapters.app.server import running

PROMPTS = ("a red circle", "a blue star")


def ask(client, picture, number):
    """Generate the image of a number, and return its pixels."""
    empty = dict.fromkeys(("noise_exponent", "mask", "resize_mode", "guidance"))
    values = {"prompt": PROMPTS[number % 2], "image": handle_file(picture), "seed": number}
    size = {"steps": 2, "width": 64, "height": 64}
    files, settings = client.predict(**values, **size, **empty, api_name="/generate")
    assert settings[0]["seed"] == number
    with Image.open(files[0]) as image:
        return image.tobytes()


def is_full(error):
    return "queue is full" in str(error).lower() or type(error).__name__ == "QueueError"


def load(address, picture, numbers, clients, folder):
    """Generate the images of some numbers with many clients.

    Returns:
        number -> pixels, and how often a client was refused.
    """
    made, refused, failures = {}, [], []

    def run(place):
        try:
            options = {
                "download_files": folder / str(place),
                "analytics_enabled": False,
                "httpx_kwargs": {"timeout": 120},
            }
            client = Client(address, verbose=False, **options)
            for number in numbers[place::clients]:
                while number not in made:
                    try:
                        made[number] = ask(client, picture, number)
                    except Exception as error:
                        if not is_full(error):
                            raise
                        refused.append(number)
                        time.sleep(0.5)
        except Exception as error:
            failures.append((place, repr(error)))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(made) == list(numbers)
    return made, len(refused)


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "picture.png"
    image = Image.new("RGB", (64, 64), "navy")
    image.paste("tomato", (10, 15, 45, 50))
    image.save(file)
    return str(file)


def test_clients_at_once_get_what_they_would_get_alone(tmp_path, picture, monkeypatch):
    use_weights(monkeypatch, write_tiny(tmp_path / "weights"))
    models = Models()
    with running(lambda: build(models), max_queue=2) as address:
        made, refused = load(address, picture, range(12), clients=6, folder=tmp_path / "together")
        serial, _ = load(address, picture, range(12), clients=1, folder=tmp_path / "alone")
    assert made == serial
    assert len(set(made.values())) == 12
    assert refused > 0


@pytest.fixture
def command():
    """The address and the process of `nexus app` with the embedded models."""
    arguments = ["app", "--port", "0", "--max-queue", "16"]
    program = f"import sys; from nexus_adapters.cli import main; sys.exit(main({arguments!r}))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        (address,) = re.findall(r"http://[\d.:]+", process.stdout.readline())
        yield address, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


@pytest.mark.full
def test_32_clients_with_5_requests_each(tmp_path, picture, command, record_property):
    address, process = command
    made, refused, memory = {}, 0, []
    for half in (range(80), range(80, 160)):
        images, count = load(address, picture, half, clients=32, folder=tmp_path / f"{half.start}")
        made |= images
        refused += count
        time.sleep(2)  # connections close
        memory.append(process.memory_info().rss)
    serial, _ = load(address, picture, range(160), clients=1, folder=tmp_path / "alone")
    print(f"refused {refused} times, RSS {[round(each / 2**20) for each in memory]} MiB")
    record_property("refused", refused)
    record_property("rss", memory)
    assert made == serial
    assert refused > 0
    assert memory[1] < 1.05 * memory[0]
