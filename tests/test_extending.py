import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_what_a_user_adds_goes_the_whole_way():
    """In a process of its own, since what is registered stays: other tests must not see it."""
    files = ["tests/extending.py"]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
