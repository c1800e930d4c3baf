// One question to up to four columns, streamed side by side with the same seed: all as one, each member, other rules.

import { answered, figuresOf } from './answer.js';
import { button, fixed, h, lookable, sumElement, summaryOf, textElement } from './look.js';

const MOST = 4;

/** Make the comparison; `state` has the controls, and takes errors. */
export function compareOf(root, state) {
  let running = null;
  let columns = []; // what is shown: {name, tokens, sources, about}
  let question = '';
  const choice = h('fieldset', { id: 'columns' });
  const box = h('textarea', { id: 'question', rows: 3, 'aria-label': 'Question', placeholder: 'Ask all of them' });
  const go = button('Ask', { id: 'compare-go', className: 'primary', onclick: () => ask() });
  const stop = button('Stop', { id: 'compare-stop', hidden: true, onclick: () => running?.abort() });
  const share = button('Save as a page', { id: 'compare-share', hidden: true, onclick: () => state.share(record()) });
  const grid = h('div', { className: 'columns' });
  root.replaceChildren(choice, box, h('div', { className: 'row' }, go, stop, share), grid);
  box.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask();
    }
  });
  let options = [];
  let offered = null;

  /** Offer what the chosen ensemble can be compared by; what was chosen before stays so. */
  function refresh() {
    const facts = state.controls.facts();
    const { rule: current } = state.controls.about();
    const before = new Map(facts === offered ? options.map(({ name, box: own }) => [name, own.checked]) : []);
    offered = facts;
    const may = (name) => facts.may_change.includes(name);
    const files = facts.files ?? [];
    const found = [{ name: 'all as one', changes: {} }];
    if (may('members')) {
      if (facts.members.length > 1)
        for (const name of facts.members) found.push({ name, changes: { members: [name], rule: facts.rule } });
      if (files.length) found.push({ name: 'without files', changes: { members: facts.members } });
    }
    if (may('rule') && facts.members.length > 1) {
      for (const rule of Object.keys(facts.rules)) if (rule !== current) found.push({ name: rule, changes: { rule } });
    }
    options = found.map((one, k) => ({
      ...one,
      box: h('input', {
        type: 'checkbox',
        checked: before.get(one.name) ?? (k < 3 && !before.size),
        onchange: () => limit(),
      }),
    }));
    choice.replaceChildren(
      h('legend', {}, `Columns, up to ${MOST}`),
      ...options.map(({ name, box: own }) => h('label', {}, own, name))
    );
    limit();
  }

  function limit() {
    const isFull = options.filter(({ box: own }) => own.checked).length >= MOST;
    for (const { box: own } of options) own.disabled = isFull && !own.checked;
  }

  async function ask() {
    const text = box.value;
    const chosen = options.filter(({ box: own }) => own.checked);
    if (!text.trim() || !chosen.length || !stop.hidden) return;
    [question, columns] = [text, []];
    running = new AbortController();
    stop.hidden = false;
    go.disabled = share.hidden = true;
    state.trouble(null);
    const seed = state.controls.body().seed;
    grid.replaceChildren();
    try {
      await Promise.all(chosen.map((one) => column(one, text, seed, running.signal)));
    } finally {
      stop.hidden = true;
      go.disabled = share.hidden = false;
    }
  }

  async function column({ name, changes }, text, seed, signal) {
    const body = { ...state.controls.body(changes), seed };
    const about = state.controls.about(body);
    const shown = textElement(about);
    const sum = sumElement('');
    const holder = h('article', { className: 'turn writing', 'aria-label': name }, h('h3', {}, name), shown, sum);
    grid.append(holder);
    const mine = { name, about };
    columns.push(mine);
    lookable(shown, about, holder, null, mine);
    const isChat = state.controls.facts().chat;
    const messages = [...state.controls.system(), { role: 'user', content: text }];
    const asked = isChat ? { messages } : { prompt: text };
    const path = isChat ? '/v1/chat/completions' : '/v1/completions';
    const found = await answered(path, { ...body, ...asked }, signal, (tokens) => shown.add(tokens));
    Object.assign(mine, found);
    holder.classList.remove('writing');
    const [[, , each]] = figuresOf(found.tokens, about.members, found.text);
    const said = [`${fixed(each ?? Infinity, 2)} bits a byte`, summaryOf(found.tokens), found.speed];
    sum.textContent = found.isEmpty ? '' : said.filter(Boolean).join(' · ');
    if (found.error) sum.append(h('span', { className: 'error' }, found.error.message));
  }

  const record = () => ({
    title: 'softmeet: a comparison',
    ...columns[0].about,
    turns: [
      { role: 'user', text: question },
      ...columns.map(({ name, tokens, sources, about }) => ({ role: 'assistant', name, tokens, sources, about })),
    ],
  });

  refresh();
  return { focus: () => box.focus(), refresh };
}
