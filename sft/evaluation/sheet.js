"use strict";
const notes = document.getElementById("notes");
const live = document.getElementById("live");
const marked = new Map([...notes.querySelectorAll(".item")].map((item) => [item, []]));
let isSaved = true;

function show(item) {
  isSaved = false;
  const lines = marked.get(item).map((mark, place) => {
    const line = document.createElement("li");
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "remove" });
    remove.addEventListener("click", () => (marked.get(item).splice(place, 1), show(item)));
    line.append(`${mark.kind}: “${mark.words}” `, remove);
    return line;
  });
  item.querySelector(".marks").replaceChildren(...lines);
}

// The selected words of a summary, by place in characters as Python counts them
function select(item) {
  const summary = item.querySelector(".summary");
  const range = getSelection().rangeCount ? getSelection().getRangeAt(0) : null;
  if (!range || range.collapsed || !summary.contains(range.commonAncestorContainer)) return null;
  const before = document.createRange();
  before.setStart(summary, 0);
  before.setEnd(range.startContainer, range.startOffset);
  const start = [...before.toString()].length;
  return { start, end: start + [...range.toString()].length, words: range.toString() };
}

notes.addEventListener("click", (event) => {
  const button = event.target.closest(".mark");
  if (!button) return;
  const item = button.closest(".item");
  const mark = select(item);
  live.textContent = mark ? "" : "Select words of this summary first";
  if (mark) (marked.get(item).push({ ...mark, kind: button.dataset.kind }), show(item));
});
// On a button, the selection would be lost before the click
notes.addEventListener("mousedown", (event) => event.target.closest(".mark") && event.preventDefault());
notes.addEventListener("change", () => (isSaved = false));
addEventListener("beforeunload", (event) => !isSaved && event.preventDefault());

function csv() {
  const lines = ["item,usable,wrong,dangerous,finding,plan"];
  for (const [item, marks] of marked) {
    const spans = (kind) => marks.filter((m) => m.kind === kind).map((m) => `${m.start}-${m.end}`).join(" | ");
    const answer = (name) => item.querySelector(`[name=${name}]`).value;
    lines.push([item.dataset.item, answer("usable"), spans("wrong"), spans("dangerous"), answer("finding"), answer("plan")].join(","));
  }
  return lines.join("\n") + "\n";
}

document.getElementById("save").addEventListener("click", () => {
  const href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  Object.assign(document.createElement("a"), { href, download: `ratings_${notes.dataset.sheet}.csv` }).click();
  isSaved = true;
  live.textContent = "Saved";
});
