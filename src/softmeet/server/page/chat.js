// The conversation: questions and answers, whose words are underlined where a member was sure of something else.

import { answered } from './answer.js';
import { h, lookable, summaryOf, textElement } from './look.js';

const EXAMPLE = 'Tell me in two sentences how a rainbow comes to be.';

/** Make the conversation; `state` has the controls, and takes errors. */
export function chatOf(root, state) {
  let turns = []; // {role, text, tokens, about, sources}
  let running = null;
  const log = h('div', { id: 'log', 'aria-live': 'polite' });
  const box = h('textarea', { id: 'message', rows: 3, 'aria-label': 'Message', placeholder: EXAMPLE });
  const send = h('button', { id: 'send', className: 'primary' }, 'Send');
  const stop = h('button', { id: 'stop', type: 'button', hidden: true, onclick: () => running?.abort() }, 'Stop');
  const again = h('button', { id: 'again', type: 'button', hidden: true, onclick: () => regenerate() }, 'Again');
  const clear = h('button', { id: 'clear', type: 'button', hidden: true, onclick: () => begin([]) }, 'New');
  const share = h(
    'button',
    { id: 'share', type: 'button', hidden: true, onclick: () => state.share(recordOf(turns)) },
    'Save as a page'
  );
  const form = h(
    'form',
    { id: 'ask', onsubmit: (event) => submit(event) },
    box,
    h('div', { className: 'row' }, send, stop, again, clear, share)
  );
  root.replaceChildren(log, form);
  box.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) submit(event);
    // The example is taken as it stands.
    if (event.key === 'Tab' && !box.value && !event.shiftKey) {
      box.value = EXAMPLE;
      event.preventDefault();
    }
  });

  function submit(event) {
    event.preventDefault();
    const text = box.value.trim() ? box.value : '';
    if (!text || running) return;
    box.value = '';
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
    const hasAnswer = turns.at(-1)?.role === 'assistant';
    stop.hidden = !running;
    send.hidden = Boolean(running);
    again.hidden = Boolean(running) || !hasAnswer;
    clear.hidden = share.hidden = Boolean(running) || !turns.length;
  }

  function add(turn) {
    const k = turns.push(turn) - 1;
    const text = textElement();
    const holder = h('article', {
      className: `turn ${turn.role}`,
      'aria-label': turn.role === 'user' ? 'you' : 'answer',
    });
    const sum = h('p', { className: 'sum' });
    if (turn.role === 'user') {
      text.append(turn.text);
      const edit = h('button', { type: 'button', className: 'edit', onclick: () => editFrom(k) }, 'Edit');
      holder.append(text, h('div', { className: 'tools' }, edit));
    } else {
      const copy = () => navigator.clipboard?.writeText(turn.text);
      const tools = h(
        'div',
        { className: 'tools' },
        h('button', { type: 'button', className: 'copy', onclick: copy }, 'Copy')
      );
      lookable(
        text,
        () => turn.about,
        holder,
        (at, other) => goOn(k, at, other),
        (at) => state.places(turn, at)
      );
      holder.append(text, sum, tools);
      if (turn.tokens.length) text.add(turn.tokens);
      sum.textContent = turn.sum ?? summaryOf(turn.tokens);
    }
    turn.shown = { text, sum, holder };
    log.append(holder);
    holder.scrollIntoView({ block: 'nearest' });
    return turn;
  }

  function editFrom(k) {
    const { text } = turns[k];
    begin(turns.slice(0, k));
    box.value = text;
    box.focus();
  }

  function regenerate() {
    begin(turns.slice(0, -1));
    answer();
  }

  /** Go on from an answer's token, in whose place another came. */
  function goOn(k, at, other) {
    if (running) return;
    const turn = turns[k];
    const before = turn.tokens.slice(0, at);
    const text = before.map((token) => token.shown ?? token.text).join('') + other;
    const asked = turns.slice(0, k);
    begin(asked);
    answer({
      ...turn,
      text,
      tokens: [...before, { ...turn.tokens[at], text: other, shown: other, ...likelihoods(turn.tokens[at], other) }],
    });
  }

  async function answer(begun = null) {
    const controller = new AbortController();
    running = controller;
    const body = state.controls.body();
    const system = state.controls.system() ? [{ role: 'system', content: state.controls.system() }] : [];
    const said = turns.map(({ role, text }) => ({ role, content: text }));
    const turn = add({
      role: 'assistant',
      text: begun?.text ?? '',
      tokens: begun?.tokens ?? [],
      about: state.controls.about(body),
      sources: [],
    });
    if (begun) said.push({ role: 'assistant', content: begun.text });
    if (begun) body.continue_final_message = true;
    turn.shown.holder.classList.add('writing');
    fit();
    const onTokens = (tokens) => {
      const isAtEnd = window.innerHeight + window.scrollY > document.body.scrollHeight - 80;
      turn.shown.text.add(tokens);
      if (isAtEnd) form.scrollIntoView({ block: 'end' });
    };
    let [found, left] = [null, 0];
    for (;;) {
      const messages = [...system, ...said.slice(left)];
      found = await answered('/v1/chat/completions', { ...body, messages }, controller.signal, onTokens);
      // Where the context is full, the first half of what was said before is left out.
      const count = said.length - left - 1 - Boolean(begun);
      if (found.error?.code !== 'context_length_exceeded' || count < 2) break;
      left += 2 * Math.ceil(count / 4);
    }
    if (running === controller) running = null;
    turn.text += found.text;
    turn.tokens = [...turn.tokens, ...found.tokens];
    turn.sources = found.sources;
    turn.used = found.used;
    const rate = found.tokens.length > 1 ? (found.tokens.length - 1) / (found.seconds - found.first / 1000) : 0;
    const speed = rate ? ` · ${rate.toFixed(1)} a second, the first after ${(found.first / 1000).toFixed(1)} s` : '';
    const cut = { length: ' · ended at the most tokens' }[found.finish] ?? '';
    const without = left ? ` · the first ${left} messages were left out, as the context is full` : '';
    turn.sum = summaryOf(turn.tokens) + speed + cut + without;
    turn.shown.sum.textContent = turn.sum;
    turn.shown.holder.classList.remove('writing');
    state.trouble(found.error);
    if (!turn.tokens.length && turns.at(-1) === turn) {
      turn.shown.holder.remove();
      const question = turns.splice(-2)[0];
      question.shown.holder.remove();
      box.value ||= question.text;
    }
    fit();
  }

  function recordOf(every) {
    const about = state.controls.about();
    const kept = every.map(({ role, text, tokens, about: own }) =>
      tokens ? { role, tokens, about: own } : { role, text }
    );
    return { title: 'softmeet: a conversation', ...about, turns: kept };
  }

  return { focus: () => box.focus() };
}

/** The likelihoods of another token that was listed at a place. */
export function likelihoods(token, other) {
  const of = (rows) => rows.find(([text]) => text === other)?.[1] ?? null;
  return {
    log_prob: of(token.top) ?? -20,
    member_log_probs: token.member_top.map(of),
    pool_log_prob: of(token.top) ?? -20,
  };
}
