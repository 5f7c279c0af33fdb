// Asking: one question, its answer as it streams, and the same question again with other settings.

import { events, post } from "./api.js";
import { $, el, milliseconds } from "./dom.js";
import { MODES, showFigures, showRuns, showStages, showTrace } from "./numbers.js";
import { clearPrompt, showPrompt, showUnfound } from "./prompt.js";

const BEYOND = 3; // passages shown that the next places of the ranking have
const MOST_RUNS = 20;
const AGAIN_MS = 250;
const MODE_HELP = {
  block: "Passages come from the cache, each encoded once and alone; only the question is computed.",
  full: "Every passage is computed anew with the question, as without blockrag.",
  none: "The model answers from what it knows; nothing is retrieved.",
};

let system = null; // limits, once they are known
let collection = () => "";
let running = null; // AbortController of what is under way
let runs = []; // of the question that was asked last
let question = "";
let again = 0;

export function setUpAsking(chosenCollection) {
  collection = chosenCollection;
  $("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    start($("question").value.trim());
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("ask-form").requestSubmit();
    }
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("rate").addEventListener("input", showSettings);
  for (const input of [$("rate"), $("auto"), $("top-k"), ...document.getElementsByName("mode")])
    input.addEventListener("change", () => {
      showSettings();
      clearTimeout(again);
      if (question && $("top-k").checkValidity()) again = setTimeout(() => start(question), AGAIN_MS);
    });
  showSettings();
}

/** The bundle's limits, which bound what can be asked. */
export function useLimits(found) {
  system = found;
  $("rate").max = String(found.bundle.chunk_tokens || 1);
  $("top-k").max = String(found.limits.max_top_k);
  $("question").maxLength = found.limits.max_question_chars;
  showSettings();
}

/** Forgets what was asked of another collection. */
export function forgetAsked() {
  running?.abort();
  question = "";
  runs = [];
  showRuns(runs, null, choose);
}

const mode = () => document.querySelector("input[name=mode]:checked").value;
const rate = () => {
  if (mode() !== "block") return 1;
  return $("auto").checked ? "auto" : Number($("rate").value);
};

function showSettings() {
  $("rate").disabled = rate() === "auto" || mode() !== "block";
  $("auto").disabled = mode() !== "block";
  $("top-k").disabled = mode() === "none";
  $("mode-help").textContent = MODE_HELP[mode()];
  $("rate-value").textContent = rate().toLocaleString("en");
  const whole = system && !system.bundle.compresses_chunks;
  const smaller = whole
    ? "Passages are left out, the worst first, until the rest is this many times smaller."
    : "This many tokens for each slot; what the question needs stays word for word.";
  const needed = "The best passage, and those that share nearly as many words with the question, are read.";
  $("rate-help").textContent = rate() === "auto" ? needed : rate() > 1 ? smaller : "1: every passage word for word.";
}

function request(text) {
  const options = { attention_mode: mode(), explain: true };
  if (mode() !== "none") options.top_k = Number($("top-k").value);
  if (mode() === "block") options.rate = rate();
  const model = mode() === "none" ? "blockrag" : `blockrag/${collection()}`;
  return { model, input: text, stream: true, include: ["file_search_call.results"], blockrag: options };
}

async function start(text) {
  if (!text) return;
  if (mode() !== "none" && !collection()) {
    say("There is no collection yet: add a document first, or ask without passages.");
    return;
  }
  running?.abort();
  const mine = (running = new AbortController());
  if (text !== question) {
    question = text;
    runs = [];
  }
  const run = { mode: mode(), rate: rate(), collection: collection(), text: "", results: [], details: null };
  opened();
  try {
    await read(run, request(text), mine);
  } catch (error) {
    if (mine !== running) return; // another question took its place
    say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  } finally {
    if (mine === running) closed();
  }
}

async function read(run, body, mine) {
  const started = performance.now();
  for await (const event of events("responses", body, mine.signal)) {
    if (event.type === "response.output_text.delta") {
      if (!run.text) say("Answering…");
      run.text += event.delta;
      $("answer").textContent = run.text;
    } else if (event.type === "response.output_item.done" && event.item.type === "file_search_call") {
      run.results = event.item.results ?? [];
    } else if (event.response?.blockrag) {
      run.details = event.response.blockrag;
      run.cut = event.type === "response.incomplete";
    }
  }
  if (!run.details) throw new Error("The answer ended before it was whole; ask again.");
  run.seconds = (performance.now() - started) / 1000;
  runs = [...runs, run].slice(-MOST_RUNS);
  closed();
  show(run, mine.signal);
  if (run.mode !== "none") await findMore(run, body.input, mine.signal);
}

async function findMore(run, query, signal) {
  const most = system?.limits.max_top_k ?? run.results.length;
  const wanted = Math.min(run.results.length + BEYOND, most);
  if (!run.results.length || wanted <= run.results.length) return;
  const path = `vector_stores/${encodeURIComponent(run.collection)}/search`;
  const found = await post(path, { query, max_num_results: wanted }, { signal });
  const texts = new Set(run.results.map((result) => result.text));
  run.unfound = found.data.filter((item) => !texts.has(item.content[0].text));
  showUnfound(run.unfound, run.results.length + 1);
}

/** Shows an earlier run again, with the settings that it was asked with. */
function choose(run) {
  for (const input of document.getElementsByName("mode")) input.checked = input.value === run.mode;
  $("auto").checked = run.rate === "auto";
  if (run.rate !== "auto") $("rate").value = String(run.rate);
  showSettings();
  show(run);
}

/** Shows a run that has ended. */
function show(run, signal = (running = new AbortController()).signal) {
  const { details } = run;
  $("answer").textContent = run.text;
  const cut = run.cut ? " The answer was cut at its longest." : "";
  say(`${MODES[run.mode]}: first token after ${milliseconds(details.time_to_first_token_ms)}.${cut}`);
  const cited = new Map(
    details.citations.filter((citation) => citation.in_prompt).map((citation) => [citation.document_id, citation]),
  );
  $("sources").replaceChildren(
    ...[...cited.values()].map((citation) => el("li", {}, citation.title || citation.document_id)),
  );
  showFigures(run);
  showStages(details.stages_ms);
  showPrompt(details, run.results);
  showUnfound(run.unfound ?? [], run.results.length + 1);
  showRuns(runs, run, choose);
  showTrace(details.trace_id, signal).catch((error) => ($("trace-note").textContent = error.message));
}

function opened() {
  $("send").hidden = true;
  $("stop").hidden = false;
  $("answer").setAttribute("aria-busy", "true");
  $("answer").textContent = "";
  $("sources").replaceChildren();
  $("figures").replaceChildren();
  $("times").hidden = true;
  clearPrompt();
  say("Searching and reading…");
}

function closed() {
  const focused = document.activeElement === $("stop");
  $("send").hidden = false;
  $("stop").hidden = true;
  if (focused) $("send").focus();
  $("answer").setAttribute("aria-busy", "false");
}

function say(text, isTrouble = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", isTrouble);
}
