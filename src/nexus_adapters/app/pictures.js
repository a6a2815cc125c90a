// Images side by side, each a button with its name under it. The value is {items: [{name, address, share, text}],
// selected}; `address` is a file or a data URL, `share` of the steps is done. Texts are set as text, never as HTML.
const list = element.querySelector(".nexus-pictures");

function figure(item, place, selected) {
  const box = document.createElement("figure"), button = document.createElement("button");
  button.type = "button";
  button.className = "frame";
  button.disabled = !item.done;
  button.setAttribute("aria-pressed", place === selected);
  button.setAttribute("aria-label", item.done ? `${item.name}: show its code and settings` : item.name);
  button.onclick = () => trigger("select", { index: place });
  if (item.address) {
    const image = document.createElement("img");
    image.src = item.address;
    image.alt = item.text ? `${item.name}: ${item.text}` : item.name;
    image.className = item.done ? "" : "preview";
    button.append(image);
  }
  if (!item.done && item.share !== null) {
    const bar = document.createElement("progress");
    bar.max = 1;
    bar.value = item.share;
    bar.setAttribute("aria-label", `Progress of ${item.name}`);
    button.append(bar);
  }
  const name = document.createElement("figcaption"), label = document.createElement("span");
  label.textContent = item.name;
  name.append(label);
  if (!item.done && item.text) {
    const text = document.createElement("small");
    text.textContent = item.text;
    name.append(text);
  }
  if (item.done && item.address) {
    const link = document.createElement("a");
    link.href = item.address;
    link.download = item.file || "image.png";
    link.textContent = "Save";
    link.setAttribute("aria-label", `Save the image of ${item.name} with its settings`);
    name.append(link);
  }
  box.append(button, name);
  return box;
}

function show() {
  const { items = [], selected = null } = props.value || {};
  const focused = [...list.querySelectorAll(".frame")].indexOf(document.activeElement);
  list.replaceChildren(...items.map((item, place) => figure(item, place, selected)));
  list.style.setProperty("--count", Math.max(1, items.length));
  list.classList.toggle("empty", !items.length);
  list.dataset.hint = props.hint;
  if (focused >= 0) list.querySelectorAll(".frame")[focused]?.focus({ preventScroll: true });
}

watch("value ".trim(), show);
show();
