// One answer on the page: collects the chunks of a stream and shows what they add up to.

import { codeElement, copyButton, element, showText } from "./text.js";

const ENDINGS = {
  length: "cut at the token limit",
  tool_calls: "asks for a tool",
  stopped: "stopped",
  failed: "broken off",
};

export const count = (number) => number.toLocaleString("en");

export const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

export class Answer {
  constructor(isPlain, onAgain) {
    this.isPlain = isPlain;
    this.content = "";
    this.reasoning = "";
    this.toolCalls = [];
    this.numPieces = 0;
    this.firstPieceAt = null;
    this.usage = null;
    this.timings = null;
    this.ending = null;
    this.isDrawn = true;
    this.build(onAgain);
  }

  build(onAgain) {
    this.element = element("article", "answer");
    this.element.setAttribute("aria-label", "Answer");
    this.element.setAttribute("aria-busy", "true");
    this.waiting = element("p", "waiting", "Reading");
    this.details = element("details", "reasoning");
    this.details.hidden = true;
    this.summary = element("summary", "", "Thinking");
    this.thoughts = element("div", "text");
    this.details.append(this.summary, this.thoughts);
    this.body = element("div", "text");
    this.calls = element("div", "calls");
    this.meta = element("footer", "meta");
    this.meta.hidden = true;
    this.facts = element("span", "facts");
    const again = element("button", "quiet again", "Again");
    again.type = "button";
    again.setAttribute("aria-label", "Answer again");
    again.addEventListener("click", onAgain);
    this.meta.append(this.facts, copyButton(() => this.content, "Copy answer"), again);
    this.element.append(this.waiting, this.details, this.body, this.calls, this.meta);
  }

  add(chunk) {
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? {};
    this.content += delta.content ?? "";
    this.reasoning += delta.reasoning_content ?? "";
    for (const call of delta.tool_calls ?? []) this.addToolCall(call);
    if (delta.content || delta.reasoning_content || delta.tool_calls) {
      this.numPieces += 1;
      this.firstPieceAt ??= performance.now();
    }
    this.usage = chunk.usage ?? this.usage;
    this.timings = chunk.timings ?? this.timings;
    this.ending = choice?.finish_reason ?? this.ending;
    if (this.isDrawn) {
      this.isDrawn = false;
      requestAnimationFrame(() => this.draw());
    }
  }

  addToolCall({ index = 0, id, function: called = {} }) {
    const call = (this.toolCalls[index] ??= { id: "", name: "", arguments: "" });
    call.id = id ?? call.id;
    call.name += called.name ?? "";
    call.arguments += called.arguments ?? "";
  }

  draw() {
    if (this.isDrawn) return;
    this.isDrawn = true;
    this.waiting.hidden = this.numPieces > 0 || !this.isBusy;
    this.details.hidden = !this.reasoning;
    this.summary.textContent = this.content || !this.isBusy ? "Thoughts" : "Thinking";
    showText(this.thoughts, this.reasoning, this.isPlain);
    showText(this.body, this.content, this.isPlain);
    this.calls.replaceChildren(
      ...this.toolCalls.filter(Boolean).map((call) => codeElement(call.arguments, `tool call: ${call.name}`)),
    );
    this.onDraw?.();
  }

  finish(ending) {
    this.ending = ending ?? this.ending;
    this.element.setAttribute("aria-busy", "false");
    this.facts.textContent = this.describe();
    this.meta.hidden = false;
    this.isDrawn = false;
    this.draw();
  }

  get isBusy() {
    return this.element.getAttribute("aria-busy") === "true";
  }

  get isEmpty() {
    return !this.content && !this.reasoning && this.toolCalls.length === 0;
  }

  get message() {
    const message = { role: "assistant", content: this.content };
    if (this.toolCalls.length) {
      message.tool_calls = this.toolCalls.map(({ id, name, arguments: text }) => ({
        id,
        type: "function",
        function: { name, arguments: text },
      }));
    }
    return message;
  }

  // Tokens per second: as the server measured, or else the pieces that came here; null before there are two.
  get speed() {
    if (this.timings?.predicted_per_second > 0) return this.timings.predicted_per_second;
    if (this.numPieces < 2) return null;
    return ((this.numPieces - 1) * 1000) / Math.max(performance.now() - this.firstPieceAt, 1);
  }

  // Tokens of the context: {prompt, cached, drawn}; null as long as the server has not told.
  get tokens() {
    if (this.usage) {
      return {
        prompt: this.usage.prompt_tokens,
        cached: this.usage.prompt_tokens_details?.cached_tokens ?? this.timings?.cache_n ?? 0,
        drawn: this.usage.completion_tokens,
      };
    }
    if (!this.timings) return null;
    const cached = this.timings.cache_n ?? 0;
    return { prompt: cached + this.timings.prompt_n, cached, drawn: this.timings.predicted_n };
  }

  describe() {
    const facts = [];
    if (this.tokens) facts.push(counted(this.tokens.drawn, "token"));
    if (this.speed) facts.push(`${this.speed.toFixed(1)} tokens/s`);
    if (this.tokens?.cached) {
      const prompt = counted(this.tokens.prompt, "prompt token");
      facts.push(`${count(this.tokens.cached)} of ${prompt} from the cache`);
    }
    if (ENDINGS[this.ending]) facts.push(ENDINGS[this.ending]);
    return facts.join(" · ");
  }
}
