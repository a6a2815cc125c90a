// A canvas to draw on, at the resolution that the model reads. The page runs this once for each canvas, with
// `element`, `props`, `trigger` and `watch` of gr.HTML. The value is {image: PNG as a data URL or null, edited}.
const LARGEST_FILE = 64 * 2 ** 20, UNDO_STEPS = 40;
const root = element.querySelector(".nexus-canvas");
const canvas = root.querySelector("canvas");
const cursor = root.querySelector(".cursor");
const message = root.querySelector("[role=status]");
const context = canvas.getContext("2d", { willReadFrequently: true });
const undone = [], done = [];
let tool = "brush", color = "", before = null, from = null, last = null, shown;
let at = [0, 0], isPenDown = false;

const hex = (text) => [1, 3, 5].map((place) => parseInt(text.slice(place, place + 2), 16));
const pixels = () => context.getImageData(0, 0, canvas.width, canvas.height);
const button = (name) => root.querySelector(`[data-tool="${name}"]`);
const thickness = () => Number(root.querySelector("[data-size]").value);

function resize(width, height) {
  canvas.width = width;
  canvas.height = height;
  root.style.setProperty("--ratio", width / height);
  at = [width >> 1, height >> 1];
}

function blank() {
  resize(...props.size);
  context.fillStyle = props.ground;
  context.fillRect(0, 0, canvas.width, canvas.height);
}

// Drawing, without antialiasing: label colors must stay exact.

function dot(x, y) {
  const radius = thickness() / 2;
  const left = Math.round(x - radius + 0.5), top = Math.round(y - radius + 0.5), count = Math.round(2 * radius);
  for (let row = 0; row < count; row++) {
    const dy = row + 0.5 - count / 2;
    const half = Math.round(Math.sqrt(Math.max(0.25, (count / 2) ** 2 - dy * dy)));
    const start = count === 1 ? 0 : Math.floor(count / 2 - half);
    context.fillRect(left + start, top + row, count === 1 ? 1 : count - 2 * start, 1);
  }
}

function line([x0, y0], [x1, y1]) {
  const steps = Math.max(1, Math.ceil(Math.hypot(x1 - x0, y1 - y0)));
  for (let step = 0; step <= steps; step++) {
    dot(x0 + ((x1 - x0) * step) / steps, y0 + ((y1 - y0) * step) / steps);
  }
}

function shape(name, [x0, y0], [x1, y1]) {
  const [left, right] = [Math.min(x0, x1), Math.max(x0, x1)], [top, bottom] = [Math.min(y0, y1), Math.max(y0, y1)];
  const isEllipse = name === "ellipse", rx = (right - left) / 2, ry = (bottom - top) / 2;
  if (props.filled) {
    const first = Math.round(top), count = Math.round(bottom) - first + 1;
    const middle = Math.round(left) + (Math.round(right) - Math.round(left) + 1) / 2;
    for (let row = 0; row < count; row++) {
      const share = isEllipse ? Math.sqrt(1 - ((2 * row + 1) / count - 1) ** 2) : 1;
      const half = ((Math.round(right) - Math.round(left) + 1) / 2) * share, start = Math.round(middle - half);
      context.fillRect(start, first + row, Math.round(middle + half) - start, 1);
    }
    return;
  }
  const corners = isEllipse
    ? Array.from({ length: 97 }, (_, i) => (i * Math.PI) / 48).map((a) => [
        left + rx + rx * Math.cos(a), top + ry + ry * Math.sin(a)])
    : [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]];
  corners.slice(1).forEach((corner, place) => line(corners[place], corner));
}

function fill(x, y) {
  const image = pixels(), data = new Uint32Array(image.data.buffer), { width, height } = image;
  const [r, g, b] = hex(color);
  const wanted = ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  const stack = [Math.floor(x) + Math.floor(y) * width], found = data[stack[0]];
  if (found === wanted) return;
  while (stack.length) {
    const place = stack.pop();
    if (data[place] !== found) continue;
    data[place] = wanted;
    const column = place % width;
    if (column > 0) stack.push(place - 1);
    if (column < width - 1) stack.push(place + 1);
    if (place >= width) stack.push(place - width);
    if (place < width * (height - 1)) stack.push(place + width);
  }
  context.putImageData(image, 0, 0);
}

function start(point) {
  before = pixels();
  from = last = point;
  context.fillStyle = tool === "eraser" ? props.ground : color;
  if (tool === "fill") fill(...point);
  if (tool === "brush" || tool === "eraser") dot(...point);
}

function move(point) {
  if (!before) return;
  if (tool === "brush" || tool === "eraser") line(last, point);
  if (["line", "rectangle", "ellipse"].includes(tool)) {
    context.putImageData(before, 0, 0);
    tool === "line" ? line(from, point) : shape(tool, from, point);
  }
  last = point;
}

function end() {
  if (!before) return;
  remember(before);
  before = null;
  send();
}

function remember(image) {
  done.push(image);
  if (done.length > UNDO_STEPS) done.shift();
  undone.length = 0;
}

function step(source, target) {
  const image = source.pop();
  if (!image) return;
  target.push(pixels());
  resize(image.width, image.height);
  context.putImageData(image, 0, 0);
  send();
}

// The value.

function isBlank() {
  const [r, g, b] = hex(props.ground), { data } = pixels();
  for (let place = 0; place < data.length; place += 4) {
    if (data[place] !== r || data[place + 1] !== g || data[place + 2] !== b) return false;
  }
  return true;
}

function send() {
  shown = isBlank() ? null : canvas.toDataURL("image/png");
  root.classList.toggle("empty", shown === null);
  props.value = { image: shown, edited: true };
  trigger("input");
}

function load(source, largest) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => {
      const scale = Math.min(1, (largest || Infinity) / Math.max(image.naturalWidth, image.naturalHeight));
      resize(Math.max(1, Math.round(image.naturalWidth * scale)), Math.max(1, Math.round(image.naturalHeight * scale)));
      context.imageSmoothingEnabled = scale < 1;
      context.imageSmoothingQuality = "high";
      context.fillStyle = "#ffffff"; // transparent parts become white, as in the command line
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      root.classList.remove("empty");
      resolve();
    };
    image.onerror = reject;
    image.src = source;
  });
}

async function open(file) {
  message.textContent = "";
  if (!file) return;
  const image = pixels(), address = URL.createObjectURL(file);
  try {
    if (file.size > LARGEST_FILE) throw new Error("too large");
    await load(address, props.largest);
  } catch (error) {
    message.textContent = file.size > LARGEST_FILE
      ? `${file.name} has more than 64 MB. Choose a smaller image.`
      : `${file.name} is not an image that this browser can read. Choose a PNG, JPEG or WebP file.`;
    return;
  } finally {
    URL.revokeObjectURL(address);
  }
  remember(image);
  send();
}

async function show() {
  const image = props.value ? props.value.image : null;
  if (image === shown) return;
  shown = image;
  before = null;
  if (image) await load(image).catch(() => blank());
  else blank();
  root.classList.toggle("empty", !image);
  done.length = undone.length = 0;
}

// Tools.

function choose(name) {
  tool = name;
  root.querySelectorAll("[data-tool]").forEach((each) => each.setAttribute("aria-pressed", each === button(name)));
}

function palette() {
  const list = root.querySelector(".colors");
  list.replaceChildren(...props.colors.map(([name, value]) => {
    const swatch = document.createElement("button");
    swatch.type = "button";
    swatch.title = name;
    swatch.setAttribute("aria-label", `Color: ${name}`);
    swatch.style.setProperty("--color", value);
    swatch.onclick = () => pick(value);
    swatch.dataset.color = value;
    return swatch;
  }));
  list.hidden = props.colors.length < 2;
  if (!props.colors.some(([, value]) => value === color)) pick(props.colors[0][1]);
  else pick(color);
  choose(tool); // an update of the page draws the buttons anew
  root.querySelector("[data-size]").value = props.thickness;
  if (shown === null || shown === undefined) blank();
}

function background() {
  root.style.setProperty("--behind", props.behind ? `url(${props.behind})` : "none");
}

function pick(value) {
  color = value;
  if (tool === "eraser") choose("brush");
  root.querySelectorAll(".colors button").forEach((each) =>
    each.setAttribute("aria-pressed", each.dataset.color === value));
  const named = props.colors.find(([, each]) => each === value);
  root.querySelector(".chosen").textContent = props.named && named ? named[0] : "";
}

const ACTIONS = {
  undo: () => step(done, undone),
  redo: () => step(undone, done),
  clear: () => { remember(pixels()); blank(); send(); },
  open: () => root.querySelector("input[type=file]").click(),
};
root.querySelectorAll("[data-tool]").forEach((each) => (each.onclick = () => choose(each.dataset.tool)));
root.querySelectorAll("[data-action]").forEach((each) => (each.onclick = () => ACTIONS[each.dataset.action]()));
root.querySelector("input[type=file]").onchange = (event) => {
  open(event.target.files[0]);
  event.target.value = "";
};

// Mouse, pen and touch.

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [
    ((event.clientX - box.left) / box.width) * canvas.width - 0.5,
    ((event.clientY - box.top) / box.height) * canvas.height - 0.5,
  ];
}
canvas.onpointerdown = (event) => {
  if (event.button !== 0) return;
  event.preventDefault();
  canvas.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  cursor.hidden = true;
  start(place(event));
};
canvas.onpointermove = (event) => (event.getCoalescedEvents?.() || [event]).forEach((each) => move(place(each)));
canvas.onpointerup = canvas.onpointercancel = end;

// Files, dropped or pasted.

root.ondragover = (event) => { event.preventDefault(); root.classList.add("over"); };
root.ondragleave = () => root.classList.remove("over");
root.ondrop = (event) => {
  event.preventDefault();
  root.classList.remove("over");
  open(event.dataTransfer.files[0]);
};
root.onpaste = (event) => open([...event.clipboardData.files][0]);

// Keyboard: arrows move the pen, Space puts it down or lifts it.

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
function showCursor() {
  cursor.hidden = false;
  cursor.style.left = `${(100 * (at[0] + 0.5)) / canvas.width}%`;
  cursor.style.top = `${(100 * (at[1] + 0.5)) / canvas.height}%`;
  cursor.classList.toggle("down", isPenDown);
}
canvas.onkeydown = (event) => {
  const key = event.key.toLowerCase(), command = event.ctrlKey || event.metaKey;
  if (command && (key === "z" || key === "y")) ACTIONS[key === "y" || event.shiftKey ? "redo" : "undo"]();
  else if (event.key in ARROWS) {
    const [dx, dy] = ARROWS[event.key], far = event.shiftKey ? 8 : 1;
    at = [
      Math.min(canvas.width - 1, Math.max(0, at[0] + dx * far)),
      Math.min(canvas.height - 1, Math.max(0, at[1] + dy * far)),
    ];
    if (isPenDown) move(at);
    showCursor();
  } else if (event.key === " ") {
    isPenDown = !isPenDown;
    isPenDown ? start(at) : end();
    showCursor();
  } else return;
  event.preventDefault();
};
canvas.onfocus = () => canvas.matches(":focus-visible") && showCursor();
canvas.onblur = () => {
  if (isPenDown) end();
  isPenDown = false;
  cursor.hidden = true;
};

watch("value", show);
// Not as quoted words: gr.HTML takes each quoted word for the name of an event.
watch("colors ground filled thickness size named".split(" "), palette);
watch("behind background".split(" "), background);
palette();
background();
choose("brush");
show();
