// Documents: upload with progress, list, warm, delete.

import { events, get, remove, upload } from "./api.js";
import { $, count, el, passages } from "./dom.js";

const PAGE = 50;
const EMPTY = "No documents yet. Add one above, then ask about it.";

let collection = () => "";
let changed = async () => {};
let shown = ""; // the collection that is listed
let last = ""; // id of the last file that is listed
let listing = 0; // how often it was asked for: what an earlier one brings is no longer wanted
let deleting = null;
let warming = false;

/** `hasChanged(name)` is called when documents came into, or left, a collection. */
export function setUpDocuments(chosenCollection, hasChanged) {
  collection = chosenCollection;
  changed = hasChanged;
  $("upload-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const files = [...$("files").files];
    if (!files.length) return say("Choose a file first.", true);
    $("files").value = "";
    return uploadAll(files);
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) {
      $("tab-documents").click();
      uploadAll([...event.dataTransfer.files]);
    }
  });
  $("more").addEventListener("click", () => list(true));
  $("warm-all").addEventListener("click", () => warm([], "all documents"));
  $("delete-no").addEventListener("click", () => $("delete-dialog").close());
  $("delete-yes").addEventListener("click", confirmed);
}

async function uploadAll(files) {
  const into = $("upload-collection").value.trim() || "default";
  let stored = 0;
  for (const file of files) stored += await uploadOne(into, file);
  if (stored) await changed(into);
}

async function uploadOne(into, file) {
  const bar = el("progress", { max: 1, value: 0, "aria-label": `Upload of ${file.name}` });
  const note = el("span", { class: "help", role: "status" }, "uploading…");
  $("uploads").prepend(el("li", {}, el("span", { class: "title" }, file.name), bar, note));
  try {
    const made = await upload(into, file, (share) => {
      bar.value = share;
      if (share >= 1) {
        bar.removeAttribute("value"); // the rest is the system's: parsing and indexing
        note.textContent = "reading and indexing…";
      }
    });
    const { passages: number, outcome } = made.blockrag;
    note.textContent = outcome === "unchanged" ? "was there already" : `${outcome}, ${passages(number)}`;
    const ask = el("button", { type: "button", class: "quiet" }, "Ask about it");
    ask.addEventListener("click", () => $("tab-ask").click() || $("question").focus());
    bar.replaceWith(ask);
    return 1;
  } catch (error) {
    note.textContent = error.message;
    note.classList.add("bad");
    bar.remove();
    return 0;
  }
}

/** Lists the chosen collection; `more`: the next page too. */
export async function list(more = false) {
  const mine = (listing += 1);
  const name = collection();
  if (!more || name !== shown) {
    shown = name;
    last = "";
    $("list").tBodies[0].replaceChildren();
  }
  if (!name) {
    $("warm-all").hidden = $("more").hidden = true;
    return say(EMPTY);
  }
  const after = last ? `&after=${encodeURIComponent(last)}` : "";
  const page = await get(`vector_stores/${encodeURIComponent(name)}/files?limit=${PAGE}${after}`);
  if (mine !== listing) return undefined;
  last = page.last_id ?? last;
  $("list").tBodies[0].append(...page.data.map(row));
  $("more").hidden = !page.has_more;
  $("warm-all").hidden = !page.data.length && !more;
  if ($("documents-status").textContent === EMPTY) say("");
  return undefined;
}

function row(file) {
  const documentId = file.id.slice(file.id.indexOf("/") + 1);
  const { title, passages: number } = file.blockrag;
  const warmIt = el("button", { type: "button", class: "quiet" }, "Warm");
  warmIt.setAttribute("aria-label", `Warm ${documentId}`);
  warmIt.addEventListener("click", () => warm([file.id], documentId));
  const deleteIt = el("button", { type: "button", class: "quiet danger" }, "Delete");
  deleteIt.setAttribute("aria-label", `Delete ${documentId}`);
  const made = el(
    "tr",
    {},
    el("th", { scope: "row" }, el("span", { class: "title" }, title || documentId),
      title && title !== documentId ? el("span", { class: "file" }, documentId) : null),
    el("td", { class: "number" }, count(number)),
    el("td", { class: "actions" }, warmIt, deleteIt),
  );
  deleteIt.addEventListener("click", () => {
    deleting = { file, documentId };
    $("delete-name").textContent = documentId;
    $("delete-dialog").showModal();
  });
  return made;
}

async function confirmed() {
  $("delete-dialog").close();
  const { file, documentId } = deleting;
  try {
    await remove(`files/${encodeURIComponent(file.id)}`);
    say(`${documentId} was deleted.`);
    await changed(shown);
  } catch (error) {
    say(error.message, true);
  }
}

async function warm(ids, what) {
  if (warming) return;
  warming = true;
  const bar = $("warm-progress");
  bar.hidden = false;
  bar.removeAttribute("value");
  say(`Warming ${what}…`);
  try {
    let step = null;
    for await (step of events("blockrag/warm", { collection: shown, file_ids: ids, stream: true }))
      bar.value = step.total ? step.done / step.total : 1;
    const encoded = step.done - step.hits;
    const full = step.over_budget ? " The cache is full." : "";
    say(`${count(step.done)} of ${passages(step.total)} warm, ${count(encoded)} encoded now.${full}`);
  } catch (error) {
    say(error.message, true);
  } finally {
    bar.hidden = true;
    warming = false;
  }
}

function say(text, isTrouble = false) {
  $("documents-status").textContent = text;
  $("documents-status").classList.toggle("bad", isTrouble);
}
