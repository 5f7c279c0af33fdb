// Wires the page: collections, tabs, the key.

import { forgetKey, get, hasKey, setKey, whenKeyIsMissing } from "./api.js";
import { forgetAsked, setUpAsking, useLimits } from "./ask.js";
import { list, setUpDocuments } from "./documents.js";
import { $, count, el } from "./dom.js";

const CHOSEN = "blockrag.collection";
const TABS = ["ask", "documents"];

let collections = [];
let reading = 0; // how often they were asked for: what an earlier one brings is no longer wanted

const chosen = () => $("collection").value;

function selectTab(name, focus = false) {
  for (const tab of TABS) {
    const button = $(`tab-${tab}`);
    button.setAttribute("aria-selected", String(tab === name));
    button.tabIndex = tab === name ? 0 : -1;
    $(tab).hidden = tab !== name;
    if (tab === name && focus) button.focus();
  }
}

function setUpTabs() {
  for (const tab of TABS) {
    $(`tab-${tab}`).addEventListener("click", () => selectTab(tab));
    $(`tab-${tab}`).addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      selectTab(TABS[(TABS.indexOf(tab) + 1) % TABS.length], true);
    });
  }
}

/** Reads the collections, and shows `wanted` or the one that was shown before. */
async function readCollections(wanted = sessionStorage.getItem(CHOSEN) ?? "") {
  const mine = (reading += 1);
  const models = await get("models");
  if (mine !== reading) return;
  const before = chosen();
  collections = models.data.filter((model) => model.blockrag).map((model) => model.blockrag);
  const names = collections.map((found) => found.collection);
  $("collection").replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  $("collection").disabled = !names.length;
  if (!names.length) $("collection").append(el("option", { value: "" }, "none yet"));
  const now = [wanted, before, names[0]].find((name) => names.includes(name)) ?? "";
  $("collection").value = now;
  if (now !== before) forgetAsked();
  await showCollection();
}

async function showCollection() {
  const found = collections.find(({ collection }) => collection === chosen());
  if (found) {
    sessionStorage.setItem(CHOSEN, found.collection);
    $("upload-collection").value = found.collection;
  }
  $("document-count").textContent = found ? `(${count(found.documents)})` : "(0)";
  await list();
}

function setUpKey() {
  let given = [];
  $("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey($("key").value.trim());
    $("key").value = "";
    $("key-dialog").close();
    $("forget-key").hidden = false;
    for (const resolve of given) resolve();
    given = [];
  });
  whenKeyIsMissing((problem) => {
    $("key-problem").textContent = problem;
    if (!$("key-dialog").open) $("key-dialog").showModal();
    return new Promise((resolve) => given.push(resolve));
  });
  $("forget-key").hidden = !hasKey();
  $("forget-key").addEventListener("click", () => {
    forgetKey();
    location.reload();
  });
}

function trouble(error) {
  $("trouble").textContent = error.message;
  $("trouble").hidden = false;
}

async function begin() {
  setUpTabs();
  setUpKey();
  setUpAsking(chosen);
  setUpDocuments(chosen, readCollections);
  $("collection").addEventListener("change", () => {
    forgetAsked();
    showCollection().catch(trouble);
  });
  await readCollections();
  if (!chosen()) selectTab("documents");
  const system = await get("blockrag/system");
  useLimits(system);
  const ill = system.services.filter((service) => !service.healthy).map((service) => service.name);
  const state = ill.length ? `not answering: ${ill.join(", ")}` : `${system.services.length} services answer`;
  $("system").textContent = `blockrag ${system.version} · ${system.bundle.name} · ${state}`;
}

begin().catch(trouble);
