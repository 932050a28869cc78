// The chat page: asks the server that sent it, and shows what comes. Text of a model is only ever put into text nodes.
"use strict";

const KEPT = "osler-chat"; // the conversation and the settings, in this browser
const DEFAULTS = { reasoning: true, temperature: 0.7, top_p: 0.95, top_k: null, max_tokens: null, seed: null };
const SAVE_MS = 500; // between two saves while a reply streams
const TEXT_TOKENS = 200; // of a model that goes on with a text and seldom ends by itself, unless the settings say another number

const $ = (id) => document.getElementById(id);
const entry = $("entry");
const settingsForm = $("settings").querySelector("form");
let models = [];
let chat = { model: "", mode: "chat", settings: { ...DEFAULTS }, turns: [] };
let busy = null; // { turn, control } while a reply is awaited
const views = new Map(); // from a turn to the elements that show it

// ---- what is kept in the browser

function load() {
  try {
    const kept = { ...chat, ...JSON.parse(localStorage.getItem(KEPT)) };
    for (const turn of kept.turns) if (turn.end === "open") turn.end = "left"; // the browser was ended while it streamed
    chat = { ...kept, settings: { ...DEFAULTS, ...kept.settings } };
  } catch (error) {
    showTrouble("What this browser kept of an earlier conversation cannot be read.");
  }
}

function save() {
  try {
    localStorage.setItem(KEPT, JSON.stringify(chat));
  } catch (error) {
    showTrouble("This conversation will be lost with a reload: the browser refuses to keep it.");
  }
}

const modelOf = (name) => models.find((model) => model.id === name);

// ---- asking

async function loadModels() {
  if (models.length) return;
  models = (await (await request("v1/models")).json()).data;
  $("trouble").hidden = true;
  $("model").replaceChildren(...models.map((model) => new Option(model.id)));
  if (!modelOf(chat.model)) chat.model = models[0].id;
  $("model").value = chat.model;
  showModel();
}

async function ask(turn) {
  abandon();
  const control = new AbortController();
  const seed = chat.settings.seed ?? Math.floor(Math.random() * 2 ** 31);
  Object.assign(turn, { thinking: "", answer: "", options: null, before: null, end: "open", trouble: "" });
  Object.assign(turn, { seed, tokens: 0, thinkingSeconds: 0 });
  busy = { turn, control };
  const view = show(turn);
  showBusy();
  say("Asked.");
  toEntry();
  const start = performance.now();
  try {
    await loadModels();
    turn.model = chat.model;
    await (turn.mode === "exam" ? examine(turn, view, control.signal) : write(turn, view, turn.question, control.signal));
  } catch (error) {
    if (busy?.control !== control) return; // asked anew, or forgotten
    const isRefusal = error instanceof Refusal;
    if (!isRefusal && error.name !== "AbortError") console.error(error);
    if (error.name === "AbortError") turn.end = "stopped";
    else Object.assign(turn, { end: "failed", trouble: isRefusal ? error.message : "The server's reply cannot be read." });
  }
  turn.seconds = (performance.now() - start) / 1000;
  busy = null;
  view.finish();
  save();
  showBusy();
  say({ stopped: "Stopped.", failed: "" }[turn.end] ?? `Answer: ${turn.answer}`);
}

function abandon() {
  busy?.control.abort();
  busy = null;
}

async function write(turn, view, text, signal) {
  const { settings } = chat;
  const model = modelOf(turn.model);
  const body = {
    model: turn.model,
    stream: true,
    stream_options: { include_usage: true },
    temperature: settings.temperature,
    top_p: settings.top_p,
    top_k: settings.top_k,
    max_tokens: settings.max_tokens ?? (model.answers_questions ? null : TEXT_TOKENS), // null: as many as fit
    seed: turn.seed,
    ...(model.answers_questions ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
    ...(model.reasons && !settings.reasoning && { reasoning_effort: "none" }),
  };
  const path = model.answers_questions ? "v1/chat/completions" : "v1/completions"; // the latter goes on with a text
  let saved = performance.now();
  for await (const event of events(await request(path, body, signal))) {
    if (event.usage) turn.tokens = event.usage.completion_tokens;
    for (const choice of event.choices) {
      view.add("thinking", choice.delta?.reasoning_content ?? "");
      view.add("answer", choice.delta?.content ?? choice.text ?? "");
      if (choice.finish_reason) turn.end = choice.finish_reason;
    }
    if (performance.now() - saved > SAVE_MS) {
      save();
      saved = performance.now();
    }
  }
}

// The options' probabilities at once, the reply, and the probabilities after the thinking.
async function examine(turn, view, signal) {
  const score = async (thinking) => {
    const body = { model: turn.model, question: turn.question, reasoning_content: thinking };
    return (await request("v1/options", body, signal)).json();
  };
  const first = await score(null);
  turn.options = first.options;
  view.bars();
  await write(turn, view, first.prompt, signal);
  if (!turn.thinking) return;
  turn.before = first.options;
  turn.options = (await score(turn.thinking)).options;
  view.bars();
}

// Asks another question in a question's place, and forgets what came after it.
function askInstead(turn, question) {
  for (const later of chat.turns.splice(chat.turns.indexOf(turn) + 1)) {
    views.get(later).element.remove();
    views.delete(later);
  }
  turn.question = question;
  ask(turn);
}

// ---- the page

const say = (text) => ($("status").textContent = text);
const percent = (share) => (share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);
const seconds = (count) => `${count < 10 ? count.toFixed(1).replace(/\.0$/, "") : Math.round(count)} s`;
const atEnd = () => innerHeight + scrollY > root.scrollHeight - 80;
const toEnd = () => scrollTo(0, root.scrollHeight);
const toEntry = () => matchMedia("(pointer: fine)").matches && entry.focus({ preventScroll: true }); // a phone would open its keyboard

function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

function onEnter(area, call) {
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    call();
  });
}

async function copy(node) {
  try {
    await navigator.clipboard.writeText(node.textContent);
    say("Copied.");
  } catch (error) {
    getSelection().selectAllChildren(node); // without HTTPS, a browser lets only the reader copy
    say("The text is selected; Ctrl+C copies it.");
  }
}

function showBusy() {
  $("stop").hidden = !busy;
  $("send").hidden = Boolean(busy);
}

function showModel() {
  const model = modelOf(chat.model);
  const continues = model?.answers_questions === false;
  const exam = chat.mode === "exam";
  entry.placeholder = exam ? "Paste a question with its options, (A) to (D)" : continues ? "Begin a text" : "Ask a question";
  const alone = continues ? "It was not taught to answer; it goes on with a text." : "Each question is answered by itself.";
  $("about").textContent = exam
    ? "Paste a question with its options. You see how likely the model finds each of them, before and after it has thought."
    : `A small language model answers, and it makes mistakes. ${alone}`;
  $("example").hidden = !model?.example;
  $("example").lastElementChild.textContent = model?.example ?? "";
  settingsForm.elements.reasoning.disabled = model?.reasons === false;
  settingsForm.elements.max_tokens.max = model?.max_model_len ?? "";
  for (const radio of $("ask").elements.mode) radio.checked = radio.value === chat.mode;
}

function showSettings() {
  for (const [name, value] of Object.entries(chat.settings)) {
    const field = settingsForm.elements[name];
    if (field.type === "checkbox") field.checked = value;
    else field.value = value ?? "";
    const output = settingsForm.querySelector(`output[for=${name}]`);
    if (output) output.textContent = value;
  }
}

function showTrouble(text) {
  $("trouble").hidden = false;
  $("trouble").textContent = text;
}

function setMode(mode) {
  chat.mode = mode;
  showModel();
  save();
}

function send() {
  const question = entry.value.trim();
  if (!question || busy) return;
  const turn = { question, mode: chat.mode };
  chat.turns.push(turn);
  entry.value = "";
  fit(entry);
  ask(turn);
  toEnd();
}

function showAll() {
  views.clear();
  $("turns").replaceChildren();
  $("welcome").hidden = false;
  chat.turns.forEach(show);
  showSettings();
  showModel();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
onEnter(entry, send);
entry.addEventListener("input", () => fit(entry));
$("stop").addEventListener("click", () => {
  busy?.control.abort();
  toEntry();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) busy?.control.abort();
});
$("ask").addEventListener("change", ({ target }) => target.name === "mode" && setMode(target.value));
$("model").addEventListener("change", () => {
  chat.model = $("model").value;
  showModel();
  save();
});
$("clear").addEventListener("click", () => {
  abandon();
  showBusy();
  chat.turns = [];
  showAll();
  save();
  say("A new conversation; the one before is gone.");
  toEntry();
});
$("example").addEventListener("click", () => {
  setMode("exam");
  entry.value = $("example").lastElementChild.textContent;
  fit(entry);
  entry.focus();
});
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("click", ({ target }) => target === $("settings") && $("settings").close());
$("defaults").addEventListener("click", () => {
  chat.settings = { ...DEFAULTS };
  showSettings();
  save();
});
settingsForm.addEventListener("input", ({ target }) => {
  if (target.type === "checkbox") chat.settings[target.name] = target.checked;
  else if (target.validity.valid) chat.settings[target.name] = target.value === "" ? null : Number(target.value);
  const output = settingsForm.querySelector(`output[for=${target.name}]`);
  if (output) output.textContent = target.value;
  save();
});
addEventListener("scroll", () => ($("newest").hidden = atEnd()), { passive: true });
$("newest").addEventListener("click", toEnd);
addEventListener("pagehide", () => {
  if (busy) busy.turn.end = "left";
  save();
  abandon(); // what the browser cuts off now is no failure of the server
});
addEventListener("storage", (event) => {
  if (event.key !== KEPT || busy) return; // another tab went on with the conversation
  load();
  showAll();
});

load();
showAll();
toEnd();
toEntry();
loadModels().catch((error) => showTrouble(error.message));
