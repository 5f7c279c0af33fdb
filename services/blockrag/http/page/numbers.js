// How long it took: figures, stages, the trace, and what was asked before.

import { get } from "./api.js";
import { $, barRow, count, el, milliseconds } from "./dom.js";

export const MODES = { block: "Cached blocks", full: "Full attention", none: "No passages" };
const STAGES = {
  retrieve: "searching the collection",
  plan: "what fits into the prompt",
  queue: "waiting for the decoder",
  kv_fetch: "cached blocks, or their encoding",
  compose: "blocks into their places",
  prefill: "computing what is not cached",
  decode: "after the first token; not to scale",
};
const POLL_MS = [300, 600, 1200, 2400];

export function showFigures(run) {
  const { details, seconds } = run;
  const { usage } = details;
  const share = usage.prompt_tokens ? usage.cached_tokens / usage.prompt_tokens : 0;
  const pace = usage.completion_tokens > 1 && details.stages_ms.decode
    ? ((usage.completion_tokens - 1) * 1000) / details.stages_ms.decode : 0;
  const figures = [
    ["First token", milliseconds(details.time_to_first_token_ms)],
    ["Whole answer", `${seconds.toFixed(1)} s`],
    ["Prompt", `${count(usage.prompt_tokens)} slots`],
    ["From caches", `${Math.round(100 * share)} %`],
    ["Pace", pace ? `${pace.toFixed(pace < 10 ? 1 : 0)} tokens/s` : "–"],
  ];
  $("figures").replaceChildren(...figures.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

export function showStages(stages) {
  $("times").hidden = false;
  let at = 0;
  const whole = Object.keys(STAGES).reduce((sum, name) => sum + (name === "decode" ? 0 : (stages[name] ?? 0)), 0) || 1;
  const rows = Object.entries(STAGES).map(([name, note]) => {
    const took = stages[name] ?? 0;
    const from = at;
    at += took;
    const row = name === "decode"
      ? barRow(name, note, "after", 0, took ? 1 : 0, milliseconds(took))
      : barRow(name, note, "before", from / whole, at / whole, milliseconds(took));
    row.firstChild.append(el("span", { class: "note" }, note));
    return row;
  });
  $("stages").tBodies[0].replaceChildren(...rows);
}

/** Fills the waterfall. Services write their spans a moment after the answer, so they are asked for until no more come. */
export async function showTrace(traceId, signal) {
  const body = $("trace").tBodies[0];
  body.replaceChildren();
  $("trace-note").textContent = "Waiting for the services to write their spans…";
  let spans = [];
  for (const pause of traceId ? POLL_MS : []) {
    await new Promise((resolve) => setTimeout(resolve, pause));
    if (signal.aborted) return;
    const seen = spans.length;
    try {
      spans = (await get(`blockrag/traces/${traceId}`, { signal })).spans;
    } catch (error) {
      if (error.name === "AbortError") return;
      throw error;
    }
    if (spans.length) draw(body, spans);
    if (spans.length && spans.length === seen) break;
  }
  $("trace-note").textContent = spans.length ? "" : "This request was not traced, or its spans are not kept here.";
}

function draw(body, spans) {
  $("trace-note").textContent = "";
  const known = new Map(spans.map((span) => [span.span_id, span]));
  const children = Map.groupBy
    ? Map.groupBy(spans, (span) => (known.has(span.parent_span_id) ? span.parent_span_id : ""))
    : grouped(spans, known);
  const end = Math.max(...spans.map((span) => span.start_ms + span.milliseconds), 0.001);
  const rows = [];
  const services = [...new Set(spans.map((span) => span.service))];
  const add = (parent, depth) => {
    for (const span of children.get(parent) ?? []) {
      const from = Math.max(0, span.start_ms) / end;
      const row = barRow(span.name, span.error || span.service, `service-${services.indexOf(span.service) % 6}`, from,
        (span.start_ms + span.milliseconds) / end, milliseconds(span.milliseconds));
      row.classList.toggle("failed", Boolean(span.error));
      row.firstChild.style.paddingInlineStart = `${Math.min(depth, 6) * 0.6}rem`;
      row.firstChild.append(el("span", { class: "service" }, ` ${span.service}`));
      rows.push(row);
      add(span.span_id, depth + 1);
    }
  };
  add("", 0);
  body.replaceChildren(...rows);
}

function grouped(spans, known) {
  const made = new Map();
  for (const span of spans) {
    const parent = known.has(span.parent_span_id) ? span.parent_span_id : "";
    made.set(parent, [...(made.get(parent) ?? []), span]);
  }
  return made;
}

/** The table of answers to one question; `choose(run)` shows one again. */
export function showRuns(runs, shown, choose) {
  $("asked").hidden = runs.length < 1;
  const slowest = Math.max(...runs.map((run) => run.details.time_to_first_token_ms), 1);
  $("runs").tBodies[0].replaceChildren(
    ...runs.map((run) => {
      const { usage, time_to_first_token_ms: first } = run.details;
      const button = el("button", { type: "button", class: "quiet" }, MODES[run.mode]);
      button.setAttribute("aria-label", `Show the answer with ${MODES[run.mode]}, rate ${run.rate}`);
      button.addEventListener("click", () => choose(run));
      const bar = el("span", { class: "bar before" });
      bar.style.width = `${(100 * first) / slowest}%`;
      const row = el(
        "tr",
        run === shown ? { "aria-current": "true" } : {},
        el("th", { scope: "row" }, button),
        el("td", {}, run.mode === "block" ? String(run.rate) : "–"),
        el("td", { class: "first" }, milliseconds(first), el("span", { class: "lane", "aria-hidden": "true" }, bar)),
        el("td", {}, `${count(usage.prompt_tokens)} slots`),
        el("td", {}, `${Math.round((100 * usage.cached_tokens) / Math.max(1, usage.prompt_tokens))} %`),
        el("td", { class: "said", title: run.text }, run.text),
      );
      return row;
    }),
  );
}
