"use strict";
// Players of one prompt and seed on one clock: the first video leads, the others follow it.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const names = Object.keys(data.variants);
const votes = [];
let playing = true;

const element = (tag, text, parent) => {
  const made = document.createElement(tag);
  if (text !== null) made.textContent = text;
  if (parent) parent.append(made);
  return made;
};
const option = (select, value, text) => { element("option", text, select).value = value; };
const videos = () => [...at("players").querySelectorAll("video")];

function shuffled(list) {
  const order = [...list];
  for (let i = order.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

function addVideo(stage, name) {
  const video = element("video", null, stage);
  Object.assign(video, { muted: true, playsInline: true, preload: "auto" });
  video.src = data.files[`${name}/${at("prompt").value}/${at("seed").value}`];
  return video;
}

function show() {
  const box = at("players"), blind = at("blind").checked;
  const chosen = names.filter((name) => at(`show-${name}`).checked);
  box.replaceChildren();
  (blind ? shuffled(chosen) : chosen).forEach((name, place, order) => {
    const figure = element("figure", null, box), stage = element("div", null, figure);
    const difference = at("difference").checked && name !== data.reference;
    stage.className = difference ? "stage difference" : "stage";
    const video = addVideo(stage, name);
    if (difference) addVideo(stage, data.reference);
    if (place === 0) {
      video.addEventListener("loadedmetadata", () => {
        // Small videos are shown pixel by pixel, large ones get room.
        box.classList.toggle("small", video.videoWidth < 256);
        box.style.setProperty("--cell", video.videoWidth < 256 ? "9rem" : "18rem");
        at("time").max = video.duration;
      });
      video.addEventListener("ended", () => { seek(0); run(); });
      video.addEventListener("timeupdate", () => { at("time").value = video.currentTime; });
    }
    const caption = element("figcaption", blind ? `video ${place + 1}` : data.variants[name].label, figure);
    if (blind) {
      const button = element("button", "better", caption);
      button.type = "button";
      button.addEventListener("click", () => vote(name, order));
    }
  });
  at("voting").hidden = !blind;
  run();
}

function vote(name, order) {
  votes.push([data.study, at("prompt").value, at("seed").value, name, order.join(" ")]);
  at("votes").textContent = votes.length;
  const prompt = at("prompt");
  prompt.selectedIndex = (prompt.selectedIndex + 1) % prompt.length;
  show();
}

function saveVotes() {
  const lines = [["study", "prompt_id", "seed", "better", "shown"], ...votes].map((row) => row.join(","));
  const link = element("a", null);
  link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
  link.download = `votes-${data.study}.csv`;
  link.click();
  URL.revokeObjectURL(link.href);
}

function run() {
  at("play").textContent = playing ? "Pause" : "Play";
  for (const video of videos()) {
    video.playbackRate = Number(at("speed").value);
    if (playing) video.play().catch(() => {}); // a browser that refuses to start by itself waits for the button
    else video.pause();
  }
}

function seek(time) {
  for (const video of videos()) video.currentTime = time;
  at("time").value = time;
}

function step(frames) {
  playing = false;
  run();
  const [leader] = videos();
  if (leader) seek(Math.min(leader.duration, Math.max(0, leader.currentTime + frames / data.fps)));
}

function follow() {
  const [leader, ...others] = videos();
  if (!leader || !playing) return;
  for (const video of others) {
    if (Math.abs(video.currentTime - leader.currentTime) > 0.5 / data.fps) video.currentTime = leader.currentTime;
    if (video.paused && !leader.paused) video.play().catch(() => {});
  }
}

for (const [id, text] of Object.entries(data.prompts)) option(at("prompt"), id, text);
for (const seed of data.seeds) option(at("seed"), seed, seed);
for (const name of names) {
  const label = element("label", null, at("choice")), box = element("input", null, label);
  Object.assign(box, { type: "checkbox", id: `show-${name}`, checked: true });
  const swatch = element("span", null, label);
  swatch.className = "swatch";
  swatch.style.background = data.variants[name].color;
  label.append(data.variants[name].label);
}
for (const id of ["prompt", "seed", "difference", "blind", "choice"]) at(id).addEventListener("change", show);
at("speed").addEventListener("change", run);
at("play").addEventListener("click", () => { playing = !playing; run(); });
at("back").addEventListener("click", () => step(-1));
at("forward").addEventListener("click", () => step(1));
at("time").addEventListener("input", (event) => { playing = false; run(); seek(Number(event.target.value)); });
at("save").addEventListener("click", saveVotes);
setInterval(follow, 200);
show();
