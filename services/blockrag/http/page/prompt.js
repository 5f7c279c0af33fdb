// What the model read: the strip of slots, tokens against slots, and the passages chunk by chunk.

import { $, barRow, count, el } from "./dom.js";

export const TIERS = {
  l1: "decoder's memory",
  store: "object store",
  disk: "disk",
  encoded: "encoded now",
  prefill: "computed with the question",
};
const FORMS = { expanded: "word for word", compressed: "compressed", dropped: "dropped", unfound: "not retrieved" };
const LONG = 420;

const total = (slots) => slots.l1 + slots.store + slots.disk + slots.encoded;

export function clearPrompt() {
  $("composed").hidden = true;
  $("unfound").hidden = true;
  $("prompt-empty").hidden = false;
  $("passages").replaceChildren();
}

/** `details` is the answer's `blockrag`; `results` the passages that were found. */
export function showPrompt(details, results) {
  const { usage, citations } = details;
  $("prompt-empty").hidden = true;
  $("composed").hidden = false;
  showStrip(details);
  showSlots(usage, citations);
  $("passages").replaceChildren(
    ...citations.map((citation, place) => passage(place + 1, citation, results[place], usage.prefill_tokens)),
  );
  if (!citations.length) $("passages").replaceChildren(el("li", { class: "help" }, "The question alone was read."));
}

/** Passages that the next places of the ranking have. */
export function showUnfound(found, first) {
  $("unfound").hidden = !found.length;
  $("unfound-passages").start = first;
  $("unfound-passages").replaceChildren(
    ...found.map((item) =>
      el(
        "li",
        { class: "passage" },
        head(item.filename, item.filename, [badge("not retrieved", "unfound")]),
        words([{ form: "unfound", text: item.content[0].text }]),
      ),
    ),
  );
}

function showStrip(details) {
  const { usage, citations } = details;
  const parts = [["Instructions", details.instruction_slots]];
  const read = citations.map((citation, rank) => [citation, rank + 1]).filter(([citation]) => citation.in_prompt);
  read.sort(([one], [other]) => one.place - other.place);
  for (const [citation, rank] of read) parts.push([`Passage ${rank}`, citation.slots]);
  details.turn_slots.forEach((slots, place) => parts.push([`Turn ${place + 1}`, slots]));
  const blocks = parts.filter(([, slots]) => total(slots));
  const name = blocks.length ? "Question" : "Whole prompt";
  const segments = blocks.flatMap(([part, slots]) =>
    Object.keys(TIERS)
      .filter((tier) => slots[tier])
      .map((tier) => [part, tier, slots[tier]]),
  );
  segments.push([name, "prefill", usage.prefill_tokens]);
  $("strip").replaceChildren(
    ...segments.map(([part, tier, slots]) => {
      const made = el("span", { class: `segment ${tier}`, title: `${part}: ${count(slots)} slots, ${TIERS[tier]}` },
        part.replace("Passage ", ""));
      made.style.flexGrow = slots;
      return made;
    }),
  );
  const told = segments.map(([part, tier, slots]) => `${part}: ${slots} slots, ${TIERS[tier]}`);
  $("strip").setAttribute("aria-label", `The prompt in order. ${told.join("; ")}.`);
  const sums = Object.keys(TIERS).map((tier) => [
    tier,
    segments.filter((segment) => segment[1] === tier).reduce((sum, segment) => sum + segment[2], 0),
  ]);
  $("tiers").replaceChildren(
    ...sums
      .filter(([, sum]) => sum)
      .map(([tier, sum]) => el("li", {}, el("span", { class: `swatch ${tier}` }), `${TIERS[tier]} ${count(sum)}`)),
  );
}

function showSlots(usage, citations) {
  const tokens = citations.reduce((sum, citation) => sum + citation.tokens, 0);
  const read = citations.filter((citation) => citation.in_prompt);
  const composed = read.reduce((sum, citation) => sum + total(citation.slots), 0);
  const slots = composed || usage.context_tokens;
  const most = Math.max(tokens, slots, 1);
  const body = $("slots").tBodies[0];
  body.replaceChildren(
    barRow("Tokens retrieved", "Of all passages that were found", "unfound", 0, tokens / most, count(tokens)),
    barRow("Tokens in the prompt", "Of the passages that were not dropped", "expanded", 0, usage.context_tokens / most,
      count(usage.context_tokens)),
    barRow("Slots they take", "A compressed chunk takes one slot", "compressed", 0, slots / most, count(slots)),
  );
}

function passage(place, citation, result, prefilled) {
  const badges = [badge(`${count(citation.tokens)} tokens`, "plain")];
  if (citation.in_prompt) {
    const tiers = Object.keys(TIERS).filter((tier) => citation.slots[tier]);
    badges.push(...tiers.map((tier) => badge(`${count(citation.slots[tier])} slots · ${TIERS[tier]}`, tier)));
    if (!tiers.length && prefilled) badges.push(badge(TIERS.prefill, "prefill"));
  } else badges.push(badge(`dropped: ${citation.dropped_reason}`, "dropped"));
  return el(
    "li",
    { class: "passage" },
    head(citation.title || citation.document_id, citation.document_id, badges),
    words(chunksOf(citation, result)),
  );
}

/** The passage in pieces of one form; its words come with the chunks where something was compressed. */
function chunksOf(citation, result) {
  const chunks = citation.chunks ?? [];
  if (chunks.some((chunk) => chunk.text)) return chunks;
  return [{ form: citation.in_prompt ? "expanded" : "dropped", text: result?.text ?? "" }];
}

function words(chunks) {
  const text = el("p", { class: "words" });
  let before = "";
  for (const chunk of chunks) {
    if (chunk.form !== before) text.append(el("span", { class: "sr-only" }, ` ${FORMS[chunk.form]}: `));
    before = chunk.form;
    const tokens = chunk.end_token ? `, tokens ${chunk.start_token} to ${chunk.end_token - 1}` : "";
    text.append(el("span", { class: `chunk ${chunk.form}`, title: FORMS[chunk.form] + tokens }, chunk.text));
  }
  if (text.textContent.length <= LONG) return text;
  text.classList.add("clipped");
  const more = el("button", { type: "button", class: "quiet", "aria-expanded": "false" }, "Show all");
  more.addEventListener("click", () => {
    const clipped = text.classList.toggle("clipped");
    more.textContent = clipped ? "Show all" : "Show less";
    more.setAttribute("aria-expanded", String(!clipped));
  });
  return el("div", {}, text, more);
}

function head(title, documentId, badges) {
  const name = el("span", { class: "title" }, title);
  const file = title === documentId ? null : el("span", { class: "file" }, documentId);
  return el("div", { class: "passage-head" }, name, file, el("span", { class: "badges" }, ...badges));
}

const badge = (text, kind) => el("span", { class: `badge ${kind}` }, text);
