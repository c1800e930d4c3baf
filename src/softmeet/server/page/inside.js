// A text of one's own: the members write on, or score it, and every token can be looked behind.

import { answered, figuresOf } from './answer.js';
import { posted } from './api.js';
import { likelihoods } from './chat.js';
import { characters, figuresElement, h, lookable, summaryOf, textElement } from './look.js';

const EXAMPLE = 'And the king said unto his daughter,';

/** Make the view of one text; `state` has the controls, and takes errors. */
export function insideOf(root, state) {
  let running = null;
  let shown = null;
  const prompt = h('textarea', { id: 'prompt', rows: 5, 'aria-label': 'Text', value: EXAMPLE });
  const go = h(
    'button',
    { id: 'go', className: 'primary', type: 'button', onclick: () => write(prompt.value) },
    'Write on'
  );
  const score = h('button', { id: 'score', type: 'button', onclick: () => scored(prompt.value) }, 'Score this text');
  const stop = h(
    'button',
    { id: 'inside-stop', type: 'button', hidden: true, onclick: () => running?.abort() },
    'Stop'
  );
  const share = h(
    'button',
    { id: 'inside-share', type: 'button', hidden: true, onclick: () => state.share(record()) },
    'Save as a page'
  );
  const panel = h('article', { id: 'text', className: 'turn', hidden: true });
  root.replaceChildren(
    h(
      'p',
      { className: 'lead' },
      'Type how a text begins, and see token by token what each model expects; or have a text of your own scored.'
    ),
    prompt,
    h('div', { className: 'row' }, go, score, stop, share),
    panel
  );

  const busy = (controller) => {
    running = controller;
    stop.hidden = !controller;
    go.disabled = score.disabled = Boolean(controller);
    share.hidden = Boolean(controller) || !shown?.tokens.length;
    panel.classList.toggle('writing', Boolean(controller));
  };

  function begin(first, about, tokens = []) {
    const text = textElement();
    const sum = h('p', { className: 'sum' });
    shown = { first, about, tokens, text, sum, sources: [], figures: null };
    text.append(h('span', { className: 'prompt' }, first));
    text.add(tokens);
    panel.hidden = false;
    panel.replaceChildren(text, sum);
    const current = shown;
    lookable(
      text,
      () => current.about,
      panel,
      (at, other) => goOn(current, at, other),
      (at) => state.places(current, at)
    );
    state.trouble(null);
    return shown;
  }

  function goOn({ first, tokens }, at, other) {
    if (running) return;
    const kept = [
      ...tokens.slice(0, at),
      { ...tokens[at], text: other, shown: other, ...likelihoods(tokens[at], other) },
    ];
    write(first, kept);
  }

  /** Have the text go on, behind tokens that are there already. */
  async function write(first, kept = []) {
    const body = state.controls.body();
    const mine = begin(first, state.controls.about(body), kept);
    const text = first + kept.map((token) => token.shown ?? token.text).join('');
    const controller = new AbortController();
    busy(controller);
    const found = await answered('/v1/completions', { ...body, prompt: text }, controller.signal, (tokens) =>
      mine.text.add(tokens)
    );
    mine.tokens = [...kept, ...found.tokens];
    mine.sources = found.sources;
    mine.sum.textContent = summaryOf(mine.tokens);
    state.trouble(found.error);
    busy(null);
  }

  async function scored(text) {
    const { model, softmeet } = state.controls.body();
    const about = state.controls.about();
    const controller = new AbortController();
    busy(controller);
    try {
      const body = { model, softmeet, prompt: text, max_tokens: 0, prompt_logprobs: 0, echo: true, logprobs: 0 };
      const {
        choices: [choice],
        softmeet: used,
      } = await posted('/v1/completions', body, controller.signal);
      const reports = choice.softmeet?.tokens ?? [];
      const tokens = used.vocabulary === 'bytes' ? characters(whole(reports))[0] : spelled(reports, choice.logprobs);
      // Nobody predicts the first token of a text, nor over bytes its first character.
      const first = used.vocabulary === 'bytes' ? [...text][0] : choice.logprobs.tokens[0];
      const mine = begin(first, about);
      mine.tokens = tokens;
      mine.text.add(tokens);
      mine.figures = figuresOf(tokens, about.members, text.slice(first.length));
      mine.sum.textContent = summaryOf(tokens);
      panel.append(figuresElement(mine.figures));
    } catch (error) {
      if (error.name !== 'AbortError') state.trouble(error);
    }
    busy(null);
  }

  const record = () => ({
    title: 'softmeet: a text',
    ...shown.about,
    figures: shown.figures,
    turns: [{ role: 'text', text: shown.first, tokens: shown.tokens }],
  });

  return { focus: () => prompt.focus() };
}

/** Leave out what is left of a first character whose first byte is not reported. */
const whole = (reports) => reports.slice(reports.findIndex(({ token }) => (token & 0xc0) !== 0x80));

/** Give the tokens of a scored text the texts that they have in it. */
const spelled = (reports, { tokens }) =>
  reports.map((report, k) => ({ ...report, shown: tokens[k + 1] ?? report.text }));
