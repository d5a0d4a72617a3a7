// The chat page: one conversation, its composer, and what the server tells of itself.

import { Answer, count, counted } from "./answer.js";
import { Problem, read, streamChat } from "./api.js";
import { Settings } from "./settings.js";
import { element } from "./text.js";

const POLL_MS = 3000;
const NEAR_END = 64; // pixels from the end within which the page follows the text
const WIDE = matchMedia("(min-width: 64rem)");

const find = (id) => document.getElementById(id);
const PARTS =
  "scroller log welcome composer message send stop problem retry context speed slots spoken settings";
const page = Object.fromEntries(PARTS.split(" ").map((id) => [id, find(id)]));

const settings = new Settings(onKey);
let turns = []; // {message, element}, oldest first
let running = null; // {controller, answer} while an answer streams
let contextSize = 0;
let isServerKnown = false;
let isKeyWrong = false;
let areSlotsTold = true;

// --- the conversation ---

function scrollToEnd() {
  page.scroller.scrollTop = page.scroller.scrollHeight;
}

function isAtEnd() {
  const { scrollTop, scrollHeight, clientHeight } = page.scroller;
  return scrollHeight - scrollTop - clientHeight < NEAR_END;
}

function addQuestion(text) {
  const unanswered = turns.at(-1)?.message.role === "user" ? turns.pop() : null;
  unanswered?.element.classList.add("unanswered");
  const question = element("article", settings.isPlain ? "question plain" : "question", text);
  question.setAttribute("aria-label", "You");
  page.log.append(question);
  turns.push({ message: { role: "user", content: text }, element: question });
}

async function answerLast() {
  hideProblem();
  const controller = new AbortController();
  const answer = new Answer(settings.isPlain, answerAgain);
  running = { controller, answer };
  let isFollowing = true;
  page.scroller.onscroll = () => (isFollowing = isAtEnd());
  answer.onDraw = () => {
    if (!answer.element.isConnected) return;
    showUse(answer);
    if (isFollowing) scrollToEnd();
  };
  page.welcome.hidden = true;
  page.log.append(answer.element);
  setBusy(true);
  scrollToEnd();
  const body = {
    messages: [...settings.systemMessages, ...turns.map((turn) => turn.message)],
    ...settings.request,
  };
  try {
    for await (const chunk of streamChat(body, settings.key, controller.signal)) answer.add(chunk);
    answer.finish();
  } catch (error) {
    answer.finish(error.name === "AbortError" ? "stopped" : "failed");
    if (error.name !== "AbortError" && answer.element.isConnected) showProblem(error);
  } finally {
    if (running?.answer === answer) {
      running = null;
      keep(answer);
      setBusy(false);
    }
  }
}

function keep(answer) {
  if (!answer.isEmpty) turns.push({ message: answer.message, element: answer.element });
  else if (answer.ending === "failed") answer.element.remove();
  const ending = { stopped: "Stopped.", failed: "" }[answer.ending] ?? "Answer complete.";
  page.spoken.textContent = ending && `${ending} ${answer.describe()}`;
}

function answerAgain() {
  if (running) return;
  if (turns.at(-1)?.message.role === "assistant") turns.pop();
  while (page.log.lastElementChild?.classList.contains("answer")) page.log.lastElementChild.remove();
  answerLast();
}

function stop() {
  running?.controller.abort();
}

function startAnew() {
  stop();
  running = null;
  turns = [];
  page.log.replaceChildren();
  page.welcome.hidden = false;
  page.speed.textContent = "";
  page.context.hidden = true;
  hideProblem();
  setBusy(false);
}

// --- the composer ---

function setBusy(isBusy) {
  page.send.hidden = isBusy;
  page.stop.hidden = !isBusy;
  if (isBusy) page.spoken.textContent = "Answering.";
  if (matchMedia("(pointer: fine)").matches) page.message.focus(); // elsewhere it would raise the keyboard
}

function fitMessage() {
  page.message.style.height = "auto";
  page.message.style.height = `${page.message.scrollHeight}px`;
}

function submit(event) {
  event.preventDefault();
  const text = page.message.value;
  if (running || !text.trim()) return;
  page.message.value = "";
  fitMessage();
  addQuestion(text);
  answerLast();
}

function onKeyDown(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  page.composer.requestSubmit();
}

function onEscape(event) {
  if (event.key !== "Escape" || event.isComposing) return;
  if (running) stop();
  else if (!page.settings.hidden && !WIDE.matches) showSettings(false);
}

// --- what is said of the server ---

function showProblem(error) {
  const isOurs = !(error instanceof Problem);
  if (isOurs) console.error(error);
  find("problem-text").textContent = isOurs ? "This page failed; its console says why." : error.message;
  page.problem.hidden = false;
  page.retry.hidden = turns.length === 0;
  scrollToEnd();
  if (error.status === 401) {
    showSettings(true);
    find("api-key").focus();
  }
}

function hideProblem() {
  page.problem.hidden = true;
}

function showUse(answer) {
  page.speed.textContent = answer.speed ? `${answer.speed.toFixed(1)} tokens/s` : "";
  const tokens = answer.tokens;
  if (!tokens || !contextSize) return;
  const used = tokens.prompt + tokens.drawn;
  const percent = (number) => `${Math.min((100 * number) / contextSize, 100)}%`;
  find("cached-bar").style.width = percent(tokens.cached);
  find("used-bar").style.width = percent(used - tokens.cached);
  const cached = tokens.cached ? `, ${count(tokens.cached)} cached` : "";
  const text = `${count(used)} of ${count(contextSize)} tokens${cached}`;
  find("context-text").textContent = text;
  page.context.hidden = false;
  page.context.setAttribute("aria-valuemax", contextSize);
  page.context.setAttribute("aria-valuenow", used);
  page.context.setAttribute("aria-valuetext", text);
}

function showServer(props) {
  const defaults = props.default_generation_settings ?? {};
  const name = props.model_alias || props.model_path?.split(/[\\/]/).at(-1) || "mla-jax";
  const numExperts = props.num_experts_per_token ?? 0;
  contextSize = defaults.n_ctx ?? props.n_ctx ?? 0;
  find("model").textContent = name;
  document.title = name === "mla-jax" ? name : `${name} · mla-jax`;
  const facts = [];
  if (contextSize) facts.push(`${count(contextSize)} tokens of context`);
  const among = props.num_experts ? ` of ${props.num_experts}` : "";
  if (numExperts) facts.push(`${numExperts}${among} experts a token`);
  find("facts").textContent = facts.join(" · ");
  settings.serve({ temperature: defaults.params?.temperature ?? defaults.temperature, numExperts });
  isServerKnown = true;
}

function showSlots(slots) {
  const numBusy = slots.filter((slot) => slot.is_processing).length;
  const numKept = slots.reduce((sum, slot) => sum + (slot.n_kept ?? 0), 0);
  const kept = numKept ? `, ${counted(numKept, "token")} kept` : "";
  page.slots.textContent = `${numBusy} of ${counted(slots.length, "slot")} busy${kept}`;
}

async function refresh() {
  if (document.hidden || isKeyWrong) return;
  try {
    if (!isServerKnown) showServer(await read("props", settings.key));
    if (areSlotsTold) showSlots(await read("slots", settings.key));
  } catch (error) {
    page.slots.textContent = "";
    if (error.status === 401) refuseKey(error);
    areSlotsTold &&= ![403, 404, 501].includes(error.status);
  }
}

function refuseKey(error) {
  isKeyWrong = true;
  if (page.problem.hidden && !running) showProblem(error);
}

function onKey() {
  hideProblem();
  isServerKnown = isKeyWrong = false;
  areSlotsTold = true;
  refresh();
  if (!running && turns.at(-1)?.message.role === "user") answerLast();
}

function showSettings(isShown) {
  page.settings.hidden = !isShown;
  document.body.classList.toggle("with-settings", isShown);
  find("toggle-settings").setAttribute("aria-expanded", String(isShown));
}

page.composer.addEventListener("submit", submit);
page.message.addEventListener("input", fitMessage);
page.message.addEventListener("keydown", onKeyDown);
page.stop.addEventListener("click", stop);
page.retry.addEventListener("click", answerAgain);
find("new-chat").addEventListener("click", startAnew);
find("toggle-settings").addEventListener("click", () => {
  showSettings(page.settings.hidden);
  if (!page.settings.hidden && !WIDE.matches) find("close-settings").focus();
});
find("close-settings").addEventListener("click", () => {
  showSettings(false);
  find("toggle-settings").focus();
});
document.addEventListener("keydown", onEscape);
document.addEventListener("visibilitychange", refresh);
showSettings(WIDE.matches);
refresh();
setInterval(refresh, POLL_MS);
