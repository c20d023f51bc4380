// Pictures that a visitor gives: one to begin with, on which a mask can be drawn, or several to edit. They stay in the
// browser until the request takes them along as data URLs: {images: [...], mask: ... or null}. `element` and `props` are
// Gradio's; props.many, props.bytes and props.masks say what can be given.
const find = (name) => element.querySelector(`.${name}`);
const input = element.querySelector("input[type=file]");
const canvas = element.querySelector("canvas");
let images = [];
let painted = false;
input.multiple = props.many > 1;

const say = (line) => (find("problem").textContent = line);
const give = () =>
  (props.value = images.length ? { images: images, mask: painted ? mask() : null } : null);

function read(file) {
  return new Promise((resolve, reject) => {
    if (file.size > props.bytes) {
      reject(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB: at most ${props.bytes / 1e6} MB are taken`);
      return;
    }
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(`${file.name} cannot be read`);
    reader.readAsDataURL(file);
  });
}

function load(url, name) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(`${name} is not a picture that can be read: choose a PNG, JPEG or WebP`);
    image.src = url;
  });
}

async function add(url, name) {
  const image = await load(url, name);
  images = props.many > 1 ? [...images, url].slice(0, props.many) : [url];
  image.className = Math.max(image.width, image.height) <= 128 ? "crisp" : "";
  image.alt = name;
  if (props.many > 1) {
    if (find("given").childElementCount < images.length) find("given").append(image);
  } else {
    find("given").replaceChildren(image);
    // The mask has the picture's shape, and enough pixels to draw on.
    const scale = 384 / Math.max(image.width, image.height);
    canvas.width = Math.max(1, Math.round(image.width * scale));
    canvas.height = Math.max(1, Math.round(image.height * scale));
    painted = false;
    find("save").hidden = true;
  }
  find("tools").hidden = false;
  find("brush").hidden = canvas.hidden = !props.masks;
  give();
}

async function take(files) {
  say("");
  for (const file of files) {
    try {
      await add(await read(file), file.name);
    } catch (problem) {
      say(String(problem));
    }
  }
  input.value = "";
}

function clear() {
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  painted = false;
  find("save").hidden = true;
  give();
}

// As large as the picture, white where it is to be drawn anew, black elsewhere.
function mask() {
  const [picture] = find("given").children;
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [picture.naturalWidth, picture.naturalHeight];
  const context = copy.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(canvas, 0, 0, copy.width, copy.height);
  const pixels = context.getImageData(0, 0, copy.width, copy.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.fill(pixels.data[i + 3] > 127 ? 255 : 0, i, i + 3);
    pixels.data[i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  const url = copy.toDataURL("image/png");
  find("save").href = url; // the command that repeats the picture needs it
  find("save").hidden = false;
  return url;
}

let last = null;
function paint(event) {
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  const point = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  const context = canvas.getContext("2d");
  context.strokeStyle = "rgb(234, 88, 12)";
  context.lineWidth = find("width").value * scale;
  context.lineCap = "round";
  context.beginPath();
  context.moveTo(...(last || point));
  context.lineTo(...point);
  context.stroke();
  last = point;
  painted = true;
}
canvas.onpointerdown = (event) => {
  canvas.setPointerCapture(event.pointerId);
  paint(event);
};
canvas.onpointermove = (event) => last && paint(event);
canvas.onpointerup = canvas.onpointercancel = () => {
  last = null;
  give();
};

input.onchange = () => take(input.files);
const drop = find("drop");
drop.ondragover = (event) => event.preventDefault();
drop.ondrop = (event) => {
  event.preventDefault();
  take(event.dataTransfer.files);
};
find("clear").onclick = clear;
find("remove").onclick = () => {
  images = [];
  find("given").replaceChildren();
  find("tools").hidden = canvas.hidden = true;
  clear();
  say("");
};
if (props.masks) {
  document.addEventListener("begin-with", (event) => {
    say("");
    add(event.detail, "the picture above").then(() => element.scrollIntoView({ block: "center" }), say);
  });
}
