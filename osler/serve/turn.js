// How the chat page shows one question with its reply, as it comes and afterwards. What a model wrote only goes into text nodes.

function show(turn) {
  const element = $("turn").content.firstElementChild.cloneNode(true);
  const find = (selector) => element.querySelector(selector);
  const nodes = { thinking: find("details .text"), answer: find(".answer") };
  const folded = find("details");
  let byHand = false; // the reader opened or closed the thinking
  let thinkingSince = 0;
  find(".question > .text").textContent = turn.question;
  find("summary").addEventListener("click", () => (byHand = true));
  find(".answer").classList.toggle("written", turn.mode === "exam");
  for (const part of Object.keys(nodes)) nodes[part].append(document.createTextNode(turn[part]));

  const view = {
    element,
    add(part, text) {
      if (!text) return;
      const follows = atEnd();
      if (part === "thinking") thinkingSince ||= performance.now();
      if (part === "answer" && thinkingSince && !turn.answer) turn.thinkingSeconds = (performance.now() - thinkingSince) / 1000;
      turn[part] += text;
      nodes[part].firstChild.appendData(text);
      view.update();
      if (follows) toEnd();
    },
    update() {
      const streams = busy?.turn === turn;
      folded.hidden = !turn.thinking;
      if (!byHand) folded.open = !turn.answer;
      const took = turn.thinkingSeconds >= 0.1 ? ` for ${seconds(turn.thinkingSeconds)}` : "";
      find("summary").textContent = streams && !turn.answer ? "Thinking …" : `Thought${took}`;
      nodes.answer.hidden = !turn.answer && (!streams || Boolean(turn.thinking));
      element.classList.toggle("streams", streams);
    },
    bars() {
      const follows = atEnd();
      find("figure").hidden = !turn.options;
      if (turn.options) drawBars(find("figure"), turn);
      if (follows) toEnd();
    },
    finish() {
      const follows = atEnd();
      view.update();
      find(".trouble").hidden = !turn.trouble;
      find(".trouble").textContent = turn.trouble;
      find(".facts").hidden = false;
      find(".facts").textContent = facts(turn);
      find("[data-do=again]").textContent = turn.end === "failed" ? "Try again" : "Regenerate";
      element.querySelector(".reply .tools").hidden = false;
      if (follows) toEnd();
    },
  };

  const edit = find(".question form");
  const change = (editing) => {
    edit.hidden = !editing;
    find(".question > .text").hidden = find(".question .tools").hidden = editing;
    if (editing) {
      edit.elements[0].value = turn.question;
      fit(edit.elements[0]);
    }
    (editing ? edit.elements[0] : find("[data-do=edit]")).focus();
  };
  const actions = {
    copy: (button) => copy(button.closest(".question") ? find(".question > .text") : nodes.answer),
    again: () => ask(turn),
    edit: () => change(true),
    keep: () => change(false),
  };
  element.addEventListener("click", ({ target }) => actions[target.dataset.do]?.(target));
  edit.addEventListener("submit", (event) => {
    event.preventDefault();
    if (edit.elements[0].value.trim()) askInstead(turn, edit.elements[0].value.trim());
  });
  edit.elements[0].addEventListener("input", () => fit(edit.elements[0]));
  onEnter(edit.elements[0], () => edit.requestSubmit());
  edit.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    change(false);
  });

  const shown = views.get(turn);
  shown ? shown.element.replaceWith(element) : $("turns").append(element);
  views.set(turn, view);
  find(".reply .tools").hidden = turn.end === "open";
  $("welcome").hidden = true;
  view.update();
  view.bars();
  if (turn.end !== "open") view.finish();
  return view;
}

function drawBars(figure, turn) {
  const best = Math.max(...turn.options.map((option) => option.probability));
  const rows = turn.options.map((option, index) => {
    const row = $("option").content.firstElementChild.cloneNode(true);
    const before = turn.before?.[index].probability;
    row.classList.toggle("best", option.probability === best);
    row.querySelector(".letter").textContent = option.letter;
    row.querySelector(".name").textContent = option.text;
    row.querySelector(".share").textContent = percent(option.probability);
    row.querySelector("i").style.width = `${100 * option.probability}%`;
    row.querySelector("b").hidden = before === undefined;
    if (before !== undefined) {
      row.querySelector("b").style.left = `${100 * before}%`;
      row.querySelector("b").title = `Before thinking: ${percent(before)}`;
    }
    return row;
  });
  figure.querySelector("ol").replaceChildren(...rows);
  figure.querySelector("figcaption").textContent = turn.before
    ? "Probability of each option after the thinking; the mark is where it was before"
    : "Probability of each option, without thinking";
}

function facts(turn) {
  const cut = turn.answer ? "cut at its longest" : "cut at its longest, before an answer";
  const ends = { length: cut, stopped: "stopped", left: "the page was left" };
  const speed = turn.tokens && turn.seconds ? `${Math.round(turn.tokens / turn.seconds)} tokens/s` : "";
  const size = turn.tokens ? `${turn.tokens} tokens` : "";
  return [ends[turn.end], turn.model, size, speed, `seed ${turn.seed}`].filter(Boolean).join(" · ");
}
