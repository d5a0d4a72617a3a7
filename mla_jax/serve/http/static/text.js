// Turns the text of an answer into elements, by createElement and textContent alone: nothing that a model
// writes is ever read as HTML.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^#{2,6} +(.+)$/;
const ITEM = /^(\s*)(?:([-*•])|(\d{1,3}[.)])) +(?=\S)/;
const INLINE = /(?<!`)`([^`\n]+)`(?!`)|(?<![\w*])\*\*(?=\S)([^*\n]+?)(?<=\S)\*\*(?![\w*])/g;

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

// Splits a text into blocks {kind: "code" | "heading" | "item" | "prose", text, language?}. The last fence
// may still be open.
function blocksOf(text) {
  const blocks = [];
  let fence = null;
  let prose = [];
  const flush = () => {
    const joined = prose.join("\n").replace(/^\n+|\s+$/g, "");
    if (joined) blocks.push({ kind: "prose", text: joined });
    prose = [];
  };
  for (const line of text.split("\n")) {
    const match = FENCE.exec(line);
    if (fence) {
      if (match && match[1].startsWith(fence.mark) && !match[2]) fence = null;
      else fence.lines.push(line);
    } else if (match) {
      flush();
      fence = { kind: "code", mark: match[1], language: match[2], lines: [] };
      blocks.push(fence);
    } else if (HEADING.test(line)) {
      flush();
      blocks.push({ kind: "heading", text: HEADING.exec(line)[1] });
    } else if (ITEM.test(line)) {
      flush();
      const mark = (_, indent, bullet, number) => `${indent}${bullet ? "•" : number} `;
      blocks.push({ kind: "item", text: line.replace(ITEM, mark) });
    } else if (line.trim() === "") {
      flush();
    } else {
      prose.push(line);
    }
  }
  flush();
  return blocks.map((block) => (block.lines ? { ...block, text: block.lines.join("\n") } : block));
}

function proseElement(tag, className, text) {
  const paragraph = element(tag, className);
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    paragraph.append(text.slice(end, match.index));
    paragraph.append(match[1] ? element("code", "", match[1]) : element("strong", "", match[2]));
    end = match.index + match[0].length;
  }
  paragraph.append(text.slice(end));
  return paragraph;
}

export function codeElement(text, title) {
  const figure = element("figure", "code");
  const caption = element("figcaption");
  const pre = element("pre");
  pre.tabIndex = 0; // a long line can be scrolled to by keyboard
  pre.append(element("code", "", text));
  caption.append(element("span", "", title || "code"), copyButton(() => text, "Copy code"));
  figure.append(caption, pre);
  return figure;
}

function blockElement(block) {
  if (block.kind === "code") return codeElement(block.text, block.language);
  return proseElement(block.kind === "heading" ? "h3" : "p", block.kind, block.text);
}

// Shows `text` in `parent`; blocks that are as before keep their elements, so that a selection in them stays.
export function showText(parent, text, isPlain) {
  const blocks = isPlain && text ? [{ kind: "plain", text }] : blocksOf(text);
  blocks.forEach((block, index) => {
    const signature = JSON.stringify([block.kind, block.language, block.text]);
    const old = parent.children[index];
    if (old?.signature === signature) return;
    const made = block.kind === "plain" ? element("pre", "plain", text) : blockElement(block);
    made.signature = signature;
    if (old) old.replaceWith(made);
    else parent.append(made);
  });
  while (parent.children.length > blocks.length) parent.lastChild.remove();
}

export function copyButton(getText, label) {
  const button = element("button", "quiet", "Copy");
  button.type = "button";
  button.setAttribute("aria-label", label);
  button.addEventListener("click", async () => {
    button.textContent = (await copy(getText())) ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // the clipboard is closed to pages that came over plain HTTP from elsewhere
  }
}

function copyBySelection(text) {
  const area = element("textarea", "unseen");
  const focused = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return isDone;
}
