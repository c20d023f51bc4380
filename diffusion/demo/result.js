// The pictures of a visitor's request as they come about, and the gallery of this session. `element`, `props` and
// `watch` are Gradio's; props.value is what page.py yields: {state, line, share, side, crisp, pictures}.
const find = (name) => element.querySelector(`.${name}`);
const make = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text) node.textContent = text;
  return node;
};
let chosen = null;

function figure(picture, side, crisp) {
  const node = make("figure");
  const image = make("img", crisp ? "crisp" : "");
  image.src = picture.src;
  image.alt = picture.caption || "";
  image.title = picture.caption || "";
  image.style.width = `${side}px`;
  node.append(image);
  if (picture.name) {
    const caption = make("figcaption", "", picture.short);
    const link = make("a", "save", "Download");
    link.href = picture.src;
    link.download = picture.name;
    caption.append(link);
    node.append(caption);
    image.onclick = () => choose(picture, node);
  }
  return node;
}

// Shows how one picture was made, and the command that makes it again.
function choose(picture, node) {
  chosen = picture;
  element.querySelectorAll("figure.chosen").forEach((other) => other.classList.remove("chosen"));
  node.classList.add("chosen");
  find("made").hidden = false;
  find("caption").textContent = picture.caption;
  // A line ends between flags; the text is the command all the same.
  const flags = picture.command.split(/ (?='?--)/).map((flag) => make("span", "", flag));
  find("command").replaceChildren(...flags.flatMap((flag, i) => (i ? [" ", flag] : [flag])));
}

function show(value) {
  const pictures = value.pictures || [];
  element.firstElementChild.dataset.state = value.state;
  find("line").textContent = value.line || "";
  find("bar").style.visibility = value.state === "drawing" || value.state === "waiting" ? "visible" : "hidden";
  find("bar").firstElementChild.style.width = `${100 * (value.share || 0)}%`;
  document.body.dataset.asked = value.state === "drawing" || value.state === "waiting" ? value.state : "";
  const grid = find("grid");
  const old = grid.querySelectorAll("img");
  if (value.state === "drawing" && old.length === pictures.length && !grid.querySelector("figcaption")) {
    pictures.forEach((picture, i) => (old[i].src = picture.src)); // in place, so that nothing flickers
  } else if (value.state !== "error" || !grid.querySelector("figcaption")) {
    grid.replaceChildren(...pictures.map((picture) => figure(picture, value.side, value.crisp)));
  }
  find("empty").hidden = grid.childElementCount > 0;
  find("made").hidden = !grid.querySelector("figcaption");
  if (value.state !== "done") return;
  choose(pictures[0], grid.firstElementChild);
  const kept = pictures.map((picture) => figure({ ...picture, short: "" }, 96, value.crisp));
  find("kept").prepend(...kept);
  find("gallery").hidden = false;
}

find("copy").onclick = async () => {
  const text = find("command");
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch {
    // Without https only this is left.
    getSelection().selectAllChildren(text);
    document.execCommand("copy");
  }
  find("copy").textContent = "Copied";
  setTimeout(() => (find("copy").textContent = "Copy"), 1500);
};
find("begin").onclick = () => document.dispatchEvent(new CustomEvent("begin-with", { detail: chosen.src }));
watch("value", () => props.value && show(props.value));
