// The conversation: questions and answers, whose words are underlined where a member was sure of something else.

import { answered, instead } from './answer.js';
import { kept } from './api.js';
import { button, h, lookable, sumElement, summaryOf, textElement, textOf } from './look.js';

const EXAMPLE = 'Tell me in two sentences how a rainbow comes to be.';
const MOST_KEPT = 2 ** 21; // characters of a conversation that outlives a reload with its look inside

/** Make the conversation; `state` has the controls, and takes errors. */
export function chatOf(root, state) {
  let turns = []; // {role, text, tokens, about, sources, sum, finish}
  let running = null;
  let past = null; // the turns before what can be undone
  let edited = null; // {k, draft}: the question that is edited, and what was in the box before
  const log = h('div', { id: 'log' });
  const spoken = h('p', { className: 'spoken', role: 'status' });
  const box = h('textarea', { id: 'message', rows: 2, 'aria-label': 'Message' });
  const send = h('button', { id: 'send', className: 'primary' }, 'Send');
  const example = button('Take the example', { id: 'example', onclick: () => fill(EXAMPLE) });
  const stop = button('Stop', { id: 'stop', onclick: () => running?.abort() });
  const cancel = button('Cancel', { id: 'cancel', onclick: () => leave() });
  const more = button('Go on', { id: 'more', onclick: () => goOnFrom(turns.length - 1, { ...turns.at(-1) }) });
  const again = button('Again', { id: 'again', onclick: () => regenerate() });
  const clear = button('New', { id: 'clear', onclick: () => begin([]) });
  const undo = button('Undo', { id: 'undo', onclick: () => begin(past, null) });
  const share = button('Save as a page', { id: 'share', onclick: () => state.share(recordOf(turns)) });
  const row = h('div', { className: 'row' }, send, cancel, example, stop, more, again, clear, undo, share);
  const form = h('form', { id: 'ask', onsubmit: (event) => submit(event) }, box, row);
  root.replaceChildren(log, spoken, form);
  box.addEventListener('input', fit);
  box.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) submit(event);
    if (event.key === 'Escape' && running) running.abort();
    else if (event.key === 'Escape') leave();
  });
  begin(kept.get('turns') ?? [], null);

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
    past = null;
    if (edited) begin(turns.slice(0, edited.k));
    // A question that found no answer is replaced.
    else if (turns.at(-1)?.role === 'user') begin(turns.slice(0, -1), null);
    add({ role: 'user', text });
    answer();
  }

  /** Show these turns in place of what there was, which can be undone. */
  function begin(shown, before = turns) {
    running?.abort();
    [past, edited, turns] = [before, null, []];
    log.replaceChildren();
    shown.forEach(add);
    keep();
    fit();
  }

  function keep() {
    const every = turns.map(({ shown, ...turn }) => turn);
    const isSmall = JSON.stringify(every).length < MOST_KEPT;
    kept.set('turns', isSmall ? every : every.map((turn) => ({ ...turn, ...(turn.tokens && { tokens: [] }) })));
  }

  function fit() {
    const isRunning = Boolean(running);
    const last = turns.at(-1);
    const focused = document.activeElement;
    stop.hidden = !isRunning;
    send.hidden = isRunning;
    cancel.hidden = !edited;
    more.hidden = isRunning || Boolean(edited) || !last?.tokens?.length || last.finish === 'stop';
    again.hidden = clear.hidden = share.hidden = isRunning || Boolean(edited) || !turns.length;
    undo.hidden = isRunning || !past?.length;
    example.hidden = isRunning || turns.length > 0 || box.value !== '';
    box.placeholder = turns.length ? 'Ask further' : EXAMPLE;
    // What had the focus may be hidden now.
    if (focused === send && isRunning) stop.focus();
    if (focused === stop && !isRunning) box.focus();
  }

  function add(turn) {
    const k = turns.push(turn) - 1;
    const text = textElement(turn.about);
    const isUser = turn.role === 'user';
    const holder = h('article', { className: `turn ${turn.role}`, 'aria-label': isUser ? 'you' : 'answer' }, text);
    const sum = sumElement(turn.sum);
    if (isUser) text.append(turn.text);
    else {
      const goOn = (at, other) => goOnFrom(k, instead(turn, at, other));
      lookable(text, turn.about, holder, goOn, turn);
      if (turn.text && !turn.tokens.length) text.append(turn.text);
      text.add(turn.tokens);
      holder.append(sum);
    }
    const edit = isUser && button('Edit', { className: 'edit', onclick: () => editFrom(k) });
    holder.append(h('div', { className: 'tools' }, edit, navigator.clipboard && copyOf(turn)));
    turn.shown = { text, sum, holder };
    log.append(holder);
    toEnd();
    return turn;
  }

  function editFrom(k) {
    if (running) return;
    edited = { k, draft: edited?.draft ?? box.value };
    fill(turns[k].text);
  }

  /** Leave a question as it was. */
  function leave() {
    if (!edited) return;
    const { draft } = edited;
    edited = null;
    fill(draft);
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
      const isAtEnd = window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 80;
      turn.shown.text.add(tokens);
      if (isAtEnd) toEnd();
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
    if (found.isEmpty && before && found.error) return begin(before, null);
    if (!found.tokens.length) {
      turns.pop();
      turn.shown.holder.remove();
      if (!box.value) {
        fill(turns.pop().text);
        log.lastChild.remove();
      }
      return;
    }
    const { text, tokens, sources, speed, finish } = found;
    const cut = found.finish === 'length' ? 'ended at the most tokens' : '';
    const without = left ? `the first ${left} messages were left out, as the context is full` : '';
    const sum = [summaryOf(tokens), speed, cut, without].filter(Boolean).join(' · ');
    Object.assign(turn, { text, tokens, sources, sum, finish });
    turn.shown.sum.textContent = sum;
    turn.shown.holder.classList.remove('writing');
    spoken.textContent = text;
    keep();
    state.refresh();
  }

  return { focus: () => box.focus(), about: () => turns.some(({ about }) => about) && recordOf(turns) };
}

const toEnd = () => window.scrollTo(0, document.documentElement.scrollHeight);

/** Browsers have a clipboard for https and this machine alone. */
function copyOf(turn) {
  const copy = button('Copy', {
    className: 'copy',
    onclick: async () => {
      await navigator.clipboard.writeText(turn.text);
      copy.textContent = 'Copied';
      setTimeout(() => (copy.textContent = 'Copy'), 1500);
    },
  });
  return copy;
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
