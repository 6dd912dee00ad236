"use strict";
// Asks for the state once a second and shows it. A growing video is fed piece by piece into a MediaSource, so that it
// goes on playing while it grows; a finished one is played as the file it is.
const $ = (id) => document.getElementById(id);
const player = $("player");
const clock = (seconds) => {
  const whole = Math.round(seconds), minutes = Math.floor(whole / 60) % 60, hours = Math.floor(whole / 3600);
  const two = (n) => String(n).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
};
const get = async (what, headers = {}) => {
  const answer = await fetch(what, { headers, cache: "no-store" });
  if (!answer.ok) throw new Error(`${what}: ${answer.status}`);
  return answer;
};
const add = (parent, tag, text = "", kind = "") => {
  const made = parent.appendChild(document.createElement(tag));
  made.textContent = text;
  made.className = kind;
  return made;
};
const SAID = {
  running: "Running", finished: "Finished",
  stopped: "Stopped before its end: what is finished is here, and the run can be continued",
  gone: "Gone: the run ended without a video, or its folder was removed",
};
const AHEAD = 90, BEHIND = 120, PIECE = 1 << 21; // seconds kept in the player, bytes fetched at once

class Growing {
  constructor(seen, at) {
    this.run = seen.run; this.next = 0; this.seen = seen; this.busy = false; this.from = at;
    this.source = new Source();
    this.source.addEventListener("sourceopen", () => {
      this.buffer = this.source.addSourceBuffer(`video/mp4; codecs="${seen.codec}"`);
      this.feed();
    }, { once: true });
    player.disableRemotePlayback = true; // without which Safari's ManagedMediaSource stays closed
    player.src = URL.createObjectURL(this.source);
    player.hidden = false;
    player.onseeking = () => this.moved();
  }
  settled() {
    return new Promise((done) => this.buffer.updating
      ? this.buffer.addEventListener("updateend", done, { once: true }) : done());
  }
  holds(time) {
    const { buffered } = this.buffer;
    for (let i = 0; i < buffered.length; i++)
      if (buffered.start(i) - 0.2 <= time && time <= buffered.end(i)) return buffered.end(i);
    return null;
  }
  async moved() { // to where nothing is kept: begin again with the fragment there
    if (!this.buffer || this.next === 0 || this.holds(player.currentTime) !== null) return;
    if (player.currentTime * this.seen.fps >= this.seen.frames) return;
    this.jump = player.currentTime;
    this.feed();
  }
  async feed() {
    if (!this.buffer || this.busy || this.source.readyState === "closed") return;
    this.busy = true;
    try {
      while (this.next < this.seen.size || this.jump !== undefined) {
        if (this.jump !== undefined) {
          const frame = Math.floor(this.jump * this.seen.fps);
          this.jump = undefined;
          this.buffer.abort();
          this.next = (await (await get(`start?frame=${frame}`)).json()).at;
        }
        const end = this.holds(player.currentTime);
        if (end !== null && end - player.currentTime > AHEAD) break;
        const until = Math.min(this.seen.size, this.next + PIECE) - 1;
        const data = await (await get("growing", { Range: `bytes=${this.next}-${until}` })).arrayBuffer();
        if (this.jump !== undefined) continue;
        if (player.currentTime > BEHIND) {
          this.buffer.remove(0, player.currentTime - BEHIND / 2);
          await this.settled();
        }
        this.buffer.appendBuffer(data);
        await this.settled();
        this.next += data.byteLength;
        if (this.from && this.holds(this.from) !== null) { player.currentTime = this.from; this.from = 0; }
      }
      const all = this.next >= this.seen.size && this.seen.state === "stopped";
      if (all && this.source.readyState === "open" && this.next) this.source.endOfStream();
    } catch (error) { $("wait").textContent = String(error.message || error); } finally { this.busy = false; }
  }
}

const Source = window.ManagedMediaSource || window.MediaSource;
let growing = null, playing = "", shownLast = "";

function play(seen) {
  const note = $("wait");
  if (seen.state === "finished") {
    const name = `finished ${seen.run}`;
    if (playing === name) return;
    playing = name; growing = null;
    const image = seen.kind.startsWith("image/"), at = player.currentTime || 0;
    note.textContent = seen.kind ? "" : "A browser cannot show a file of this kind.";
    player.hidden = image || !seen.kind; $("picture").hidden = !image;
    player.onseeking = null;
    if (image) { player.removeAttribute("src"); $("picture").src = "finished"; }
    else if (seen.kind) {
      player.src = "finished"; player.loop = true;
      player.onloadedmetadata = () => { player.currentTime = Math.min(at, player.duration || 0); };
      player.play().catch(() => {});
    }
  } else if (seen.size && seen.codec) {
    if (!Source || !Source.isTypeSupported(`video/mp4; codecs="${seen.codec}"`)) {
      note.textContent = "This browser cannot play the video while it grows; its last frames are below.";
    } else if (!growing || growing.run !== seen.run || seen.size < growing.next) {
      playing = seen.run;
      growing = new Growing(seen, growing ? player.currentTime : 0);
    } else { growing.seen = seen; growing.feed(); }
  }
  if (growing) {
    const end = seen.frames / seen.fps;
    const waits = seen.state === "running" && player.currentTime > end - 0.3;
    note.textContent = `${clock(player.currentTime)} of ${clock(end)} that can be watched`
      + (waits ? "; waiting for the next frames" : "");
  }
}

function stages(seen) {
  const place = $("stages"), total = seen.state === "running" || seen.state === "stopped";
  place.replaceChildren();
  for (const stage of total ? seen.stages : []) {
    add(place, "p", `${stage.name}: frame ${stage.done} of ${stage.total}`, "small");
    const bar = add(place, "progress");
    bar.max = stage.total; bar.value = stage.done;
    bar.ariaLabel = stage.name;
  }
}

async function last(seen) {
  const key = `${seen.run} ${seen.last}`, shown = seen.state === "running" || seen.state === "stopped";
  if (!shown) { $("last").replaceChildren(); $("newest").hidden = true; }
  if (!shown || key === shownLast) return;
  shownLast = key;
  const stills = (await (await get("last")).json()).last;
  if (!stills.length) return;
  $("newest").hidden = false;
  $("last").replaceChildren();
  for (const still of stills) {
    const figure = add($("last"), "figure");
    Object.assign(figure.appendChild(new Image()), { src: still.picture, alt: `frame ${still.frame}` });
    add(add(figure, "figcaption", `${still.time} `), "span", `#${still.frame}`, "soft");
  }
}

function one(seen) {
  const left = seen.left === null ? "" : `, ${clock(seen.left)} left`;
  $("said").textContent = SAID[seen.state] + left;
  $("said").className = seen.state === "gone" ? "failed" : "";
  $("resume").hidden = seen.state !== "stopped";
  stages(seen);
  play(seen);
  last(seen).catch(() => {});
  let current = null;
  for (const row of document.querySelectorAll("[data-frame]")) {
    const begun = seen.state === "finished" || Number(row.dataset.frame) < Math.max(seen.frames, 1);
    row.className = begun ? "" : "later";
    if (begun) current = row;
  }
  if (current && seen.state === "running") current.className = "now";
}

function all(rows) {
  const count = (state) => rows.filter((row) => row.state === state).length;
  const parts = ["finished", "running", "stopped"].filter(count).map((state) => `${count(state)} ${state}`);
  $("said").textContent = parts.join(", ") || "No videos here yet";
  $("rows").replaceChildren();
  for (const row of rows) {
    const line = add($("rows"), "tr");
    add(add(line, "td", "", "text"), "a", row.name).href = row.url;
    const cell = (label, text, kind = "") => { const made = add(line, "td", text, kind); made.dataset.label = label; return made; };
    cell("state", row.state, row.state === "running" ? "now" : "");
    const stage = row.stages.at(-1), bar = add(cell("progress", ""), "progress");
    const done = row.stages.reduce((sum, each) => sum + each.done, 0);
    bar.max = row.stages.reduce((sum, each) => sum + each.total, 0) || 1;
    bar.value = row.state === "finished" ? 1 : done;
    cell("frames", stage ? `${stage.done} of ${stage.total}` : "");
    cell("left", row.left === null ? "" : clock(row.left));
  }
}

async function tick() {
  try {
    const state = await (await get("state")).json();
    if (state.rows) all(state.rows); else one(state);
  } catch (error) {
    $("said").textContent = "`streamt2v watch` has ended, or cannot be reached. Start it again to go on.";
    $("said").className = "failed";
  }
  setTimeout(tick, document.hidden ? 5000 : 1000);
}
tick();
