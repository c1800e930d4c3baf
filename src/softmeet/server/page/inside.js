// A text of one's own: the members write on, or score it, and every token can be looked behind.

import { answered, figuresOf, instead } from './answer.js';
import { posted } from './api.js';
import { button, characters, figuresElement, h, lookable, sumElement, summaryOf, textElement, textOf } from './look.js';

const EXAMPLE = 'And the king said unto his daughter,';

/** Make the view of one text; `state` has the controls, and takes errors. */
export function insideOf(root, state) {
  let running = null;
  let shown = null;
  const prompt = h('textarea', { id: 'prompt', rows: 5, 'aria-label': 'Text', value: EXAMPLE });
  const go = button('Write on', { id: 'go', className: 'primary', onclick: () => write(prompt.value) });
  const score = button('Score this text', { id: 'score', onclick: () => scored(prompt.value) });
  const more = button('Go on', { id: 'inside-more', hidden: true, onclick: () => write(shown.first, { ...shown }) });
  const stop = button('Stop', { id: 'inside-stop', hidden: true, onclick: () => running?.abort() });
  const share = button('Save as a page', { id: 'inside-share', hidden: true, onclick: () => state.share(record()) });
  const panel = h('article', { id: 'text', className: 'turn', hidden: true });
  root.replaceChildren(
    h(
      'p',
      { className: 'lead' },
      'Type how a text begins, and see token by token what each model expects; or have a text of your own scored.'
    ),
    prompt,
    h('div', { className: 'row' }, go, more, score, stop, share),
    panel
  );

  const busy = (controller) => {
    running = controller;
    stop.hidden = !controller;
    go.disabled = score.disabled = Boolean(controller);
    share.hidden = Boolean(controller) || !shown?.tokens.length;
    more.hidden = share.hidden || shown.finish === 'stop';
    panel.classList.toggle('writing', Boolean(controller));
  };

  function begin(first, about, { tokens, sources } = { tokens: [], sources: [] }) {
    const text = textElement(about);
    const sum = sumElement('');
    shown = { first, about, tokens, text, sum, sources, figures: null, finish: null };
    text.append(h('span', { className: 'prompt' }, first));
    text.add(tokens);
    panel.hidden = false;
    panel.replaceChildren(text, sum);
    const current = shown;
    const goOn = (at, other) => running || write(current.first, instead(current, at, other));
    lookable(text, about, panel, goOn, current);
    state.trouble(null);
    return shown;
  }

  /** Have the text go on, behind tokens that are there already. */
  async function write(first, begun = undefined) {
    const body = state.controls.body();
    const mine = begin(first, state.controls.about(body), begun);
    const controller = new AbortController();
    busy(controller);
    const asked = { ...body, prompt: first + textOf(mine.tokens) };
    const onTokens = (tokens) => mine.text.add(tokens);
    const found = await answered('/v1/completions', asked, controller.signal, onTokens, begun);
    const { tokens, sources, finish, speed } = found;
    Object.assign(mine, { tokens, sources, finish });
    const cut = finish === 'length' ? 'ended at the most tokens' : '';
    mine.sum.textContent = [summaryOf(tokens), speed, cut].filter(Boolean).join(' · ');
    if (found.error) state.trouble(found.error);
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
      const said = textOf(tokens);
      const first = text.endsWith(said) ? text.slice(0, text.length - said.length) : '';
      const mine = begin(first, about);
      mine.tokens = tokens;
      mine.text.add(tokens);
      mine.figures = figuresOf(tokens, about.members, said);
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
    turns: [{ role: 'text', text: shown.first, tokens: shown.tokens, sources: shown.sources }],
  });

  return { focus: () => prompt.focus(), about: () => shown?.about };
}

/** Leave out what is left of a first character whose first byte is not reported. */
const whole = (reports) => reports.slice(reports.findIndex(({ token }) => (token & 0xc0) !== 0x80));

/** Give the tokens of a scored text the texts that they have in it; a character in several stands at its last one. */
function spelled(reports, { tokens }) {
  let held = [];
  const shown = tokens.map((text) => {
    if (!text.startsWith('bytes:')) return text;
    held.push(...[...text.matchAll(/\\x([0-9a-f]{2})/g)].map(([, byte]) => Number.parseInt(byte, 16)));
    const whole = new TextDecoder('utf-8', { ignoreBOM: true }).decode(new Uint8Array(held), { stream: true });
    if (whole) held = [];
    return whole;
  });
  return reports.map((report, k) => ({ ...report, shown: shown[k + 1] ?? report.text }));
}
