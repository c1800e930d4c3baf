// The conversation: questions and answers, whose words are underlined where a member was sure of something else.

import { answered, instead } from './answer.js';
import { button, h, lookable, summaryOf, textElement, textOf } from './look.js';

const EXAMPLE = 'Tell me in two sentences how a rainbow comes to be.';

/** Make the conversation; `state` has the controls, and takes errors. */
export function chatOf(root, state) {
  let turns = []; // {role, text, tokens, about, sources}
  let running = null;
  const log = h('div', { id: 'log' });
  const spoken = h('p', { className: 'spoken', role: 'status' });
  const box = h('textarea', { id: 'message', rows: 3, 'aria-label': 'Message', placeholder: EXAMPLE });
  const send = h('button', { id: 'send', className: 'primary' }, 'Send');
  const example = button('Take the example', { id: 'example', onclick: () => fill(EXAMPLE) });
  const stop = button('Stop', { id: 'stop', onclick: () => running?.abort() });
  const again = button('Again', { id: 'again', onclick: () => regenerate() });
  const clear = button('New', { id: 'clear', onclick: () => begin([]) });
  const share = button('Save as a page', { id: 'share', onclick: () => state.share(recordOf(turns)) });
  const row = h('div', { className: 'row' }, send, example, stop, again, clear, share);
  const form = h('form', { id: 'ask', onsubmit: (event) => submit(event) }, box, row);
  root.replaceChildren(log, spoken, form);
  box.addEventListener('input', fit);
  box.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) submit(event);
  });
  fit();

  function fill(text) {
    box.value = text;
    box.focus();
    fit();
  }

  function submit(event) {
    event.preventDefault();
    const text = box.value;
    if (!text.trim() || running) return;
    box.value = '';
    // A question that found no answer is replaced.
    if (turns.at(-1)?.role === 'user') begin(turns.slice(0, -1));
    add({ role: 'user', text });
    answer();
  }

  function begin(kept) {
    running?.abort();
    turns = [];
    log.replaceChildren();
    kept.forEach(add);
    fit();
  }

  function fit() {
    const isRunning = Boolean(running);
    stop.hidden = !isRunning;
    send.hidden = isRunning;
    again.hidden = clear.hidden = share.hidden = isRunning || !turns.length;
    example.hidden = isRunning || turns.length > 0 || box.value !== '';
  }

  function add(turn) {
    const k = turns.push(turn) - 1;
    const text = textElement(turn.about);
    const isUser = turn.role === 'user';
    const holder = h('article', { className: `turn ${turn.role}`, 'aria-label': isUser ? 'you' : 'answer' }, text);
    const sum = h('p', { className: 'sum' });
    if (isUser) {
      text.append(turn.text);
      holder.append(
        h('div', { className: 'tools' }, button('Edit', { className: 'edit', onclick: () => editFrom(k) }))
      );
    } else {
      const goOn = (at, other) => goOnFrom(k, instead(turn, at, other));
      lookable(text, turn.about, holder, goOn, turn);
      text.add(turn.tokens);
      sum.textContent = turn.sum;
      // Browsers have a clipboard for https and this machine alone.
      const copy = button('Copy', { className: 'copy', onclick: () => navigator.clipboard.writeText(turn.text) });
      holder.append(sum, h('div', { className: 'tools' }, navigator.clipboard && copy));
    }
    turn.shown = { text, sum, holder };
    log.append(holder);
    holder.scrollIntoView({ block: 'nearest' });
    return turn;
  }

  function editFrom(k) {
    const { text } = turns[k];
    begin(turns.slice(0, k));
    fill(text);
  }

  function regenerate() {
    const before = turns;
    begin(turns.slice(0, turns.findLastIndex(({ role }) => role === 'user') + 1));
    answer(before);
  }

  function goOnFrom(k, begun) {
    if (running) return;
    const before = turns;
    begin(turns.slice(0, k));
    answer(before, begun);
  }

  /** Answer what was said last; where that fails before a token came, the turns `before` are there again. */
  async function answer(before = null, begun = undefined) {
    const controller = new AbortController();
    running = controller;
    state.trouble(null);
    const body = state.controls.body();
    const said = turns.map(({ role, text }) => ({ role, content: text }));
    const turn = add({
      role: 'assistant',
      text: '',
      tokens: begun?.tokens ?? [],
      about: state.controls.about(body),
      sources: [],
      sum: '',
    });
    if (begun) {
      said.push({ role: 'assistant', content: textOf(begun.tokens) });
      body.continue_final_message = true;
    }
    turn.shown.holder.classList.add('writing');
    fit();
    const onTokens = (tokens) => {
      const isAtEnd = window.innerHeight + window.scrollY > document.body.scrollHeight - 80;
      turn.shown.text.add(tokens);
      if (isAtEnd) form.scrollIntoView({ block: 'end' });
    };
    let found = null;
    let left = 0;
    for (;;) {
      const messages = [...state.controls.system(), ...said.slice(left)];
      const asked = { ...body, messages };
      found = await answered('/v1/chat/completions', asked, controller.signal, onTokens, begun);
      // Where the context is full, the first half of what was said before is left out.
      const count = said.length - left - 1 - Boolean(begun);
      if (found.error?.code !== 'context_length_exceeded' || count < 2) break;
      left += 2 * Math.ceil(count / 4);
    }
    if (running === controller) running = null;
    if (found.error) state.trouble(found.error);
    if (turns.at(-1) === turn) ended(turn, found, left, before);
    fit();
  }

  function ended(turn, found, left, before) {
    if (found.isEmpty && before && found.error) return begin(before);
    if (!found.tokens.length) {
      turns.pop();
      turn.shown.holder.remove();
      if (!box.value) editFrom(turns.length - 1);
      return;
    }
    const { text, tokens, sources, speed } = found;
    const cut = found.finish === 'length' ? 'ended at the most tokens' : '';
    const without = left ? `the first ${left} messages were left out, as the context is full` : '';
    const sum = [summaryOf(tokens), speed, cut, without].filter(Boolean).join(' · ');
    Object.assign(turn, { text, tokens, sources, sum });
    turn.shown.sum.textContent = sum;
    turn.shown.holder.classList.remove('writing');
    spoken.textContent = text;
  }

  return { focus: () => box.focus() };
}

/** What is saved of a conversation: its turns, and who had a part in any of them. */
function recordOf(turns) {
  const every = turns.flatMap(({ about }) => about ?? []);
  const once = (of) => [...new Set(every.flatMap(of))];
  const members = once((about) => about.members);
  const hues = members.map((name) => every.flatMap((own) => own.hues[own.members.indexOf(name)] ?? [])[0]);
  return {
    title: 'softmeet: a conversation',
    members,
    hues,
    files: once((about) => about.files),
    rule: once((about) => about.rule).join(', '),
    turns: turns.map(({ role, text, tokens, sources, about }) =>
      tokens ? { role, tokens, sources, about } : { role, text }
    ),
  };
}
