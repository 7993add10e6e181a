"use strict";
const list = document.getElementById("notes");
const cards = [...list.children];
const live = document.getElementById("live");

// Sorting and filtering
function arrange() {
  const [sort, filter] = ["sort", "filter"].map((id) => document.getElementById(id).value);
  const sign = sort === "place" ? 1 : -1;
  cards.sort((a, b) => sign * (a.dataset[sort] - b.dataset[sort]) || a.dataset.place - b.dataset.place);
  let n = 0;
  for (const card of cards) {
    card.hidden = filter !== "" && !card.dataset.fails.split("|").includes(filter);
    n += !card.hidden;
    list.append(card);
  }
  live.textContent = `${n} of ${cards.length} notes shown`;
}
document.querySelector(".controls").addEventListener("change", arrange);

// A summary's sentence lights the note sentences that support it
function light(sentence) {
  for (const lit of document.querySelectorAll(".lit")) lit.classList.remove("lit");
  if (!sentence) return;
  sentence.classList.add("lit");
  const note = sentence.closest("article").querySelectorAll(".note span");
  for (const number of sentence.dataset.support.split(" ").filter(Boolean)) note[number - 1].classList.add("lit");
}
for (const type of ["pointerover", "focusin", "click"]) {
  list.addEventListener(type, (event) => {
    const sentence = event.target.closest(".s");
    if (sentence || type !== "pointerover") light(sentence);
    if (sentence && type === "focusin") {
      const [first, ...more] = sentence.closest("article").querySelectorAll(".note .lit");
      live.textContent = first ? `Supported by ${first.textContent.slice(0, 120)} … and ${more.length} more` : "No note sentence supports this";
    }
  });
}
document.addEventListener("keydown", (event) => event.key === "Escape" && light(null));
