// The look inside a text: coloured tokens, and what stands behind each. It needs no other file and no server, since
// pages that are shared have it in them.

const FULL = { disagreement: 0.5, surprise: 6 }; // nats of the full colour
const SURE = Math.log(0.5); // a member is sure of what it gives half of its probability
const UNLIKELY = Math.log(0.1);
const END = 256; // of a text over bytes
const HUES = [212, 28, 275, 165, 340, 95];
const FILES = 130;

/** Make an element; attributes that are functions listen to events, `vars` are CSS variables. */
export function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === 'function') made.addEventListener(name.slice(2), value);
    else if (name === 'vars') for (const [key, own] of Object.entries(value)) made.style.setProperty(`--${key}`, own);
    else if (name in made && name !== 'list' && name !== 'role') made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** Make a button that sends no form. */
export const button = (label, attributes) => h('button', { type: 'button', ...attributes }, label);

// JSON has null for the log-probability of 0, and for an infinite divergence.
const probability = (nats) => Math.exp(nats ?? -Infinity);
export const percent = (nats, digits = 1) => `${(100 * probability(nats)).toFixed(digits)}%`;
export const fixed = (x, digits) => (Number.isFinite(x) ? x.toFixed(digits) : '∞');
export const visible = (text) => text.replaceAll(' ', '␣').replaceAll('\n', '⏎');
const sum = (numbers) => numbers.reduce((all, x) => all + (x ?? 0), 0);
const mean = (numbers) => sum(numbers) / Math.max(numbers.length, 1);

/** The text of tokens, as the stream had it. */
export const textOf = (tokens) => tokens.map((token) => token.shown ?? token.text).join('');

/** Whether a member was asked; a closed gate leaves some out, whose figures are null. */
const isAsked = (token, k) => token.member_log_probs[k] !== null || token.member_top[k].length > 0;

/** How far the members that were asked are apart, in nats summed over them. */
const apartness = (token) =>
  sum(token.disagreement.map((nats, k) => nats ?? (isAsked(token, k) ? Number.POSITIVE_INFINITY : 0)));

/** The members that were sure of something else than what came: their numbers. */
export function doubters(token) {
  const { text } = token;
  const isSame = (likeliest) =>
    likeliest === text ||
    // A stretch of bytes is several tokens of a member's, and a token of its several characters.
    (token.token === undefined && text.startsWith(likeliest)) ||
    (token.unit === 'character' && text !== '' && likeliest.startsWith(text));
  // What a single model writes differs from what it was sure of by the draw alone.
  const isAlone = token.member_top.length + token.claims.length < 2;
  return token.member_top.flatMap(([likeliest], k) => {
    const isSure = likeliest && likeliest[1] >= SURE && !isSame(likeliest[0]);
    return isSure && !isAlone && !token.isPut && (token.member_log_probs[k] ?? -Infinity) < UNLIKELY ? [k] : [];
  });
}

/** Whose a token is: the number of the member that made it likely, the number of members for files, null for all. */
export function owner(token) {
  if (mean(token.claims) && Math.max(...token.claims) > 0.5) return token.member_log_probs.length;
  const shares = token.member_log_probs.map(probability);
  const k = shares.indexOf(Math.max(...shares));
  return shares.length > 1 && shares[k] > 2 * mean(shares.toSpliced(k, 1)) ? k : null;
}

/** Join reports of bytes to one for each whole character; returns these, and the reports that are left. */
export function characters(reports) {
  const found = [];
  let held = [];
  for (const report of reports) {
    held.push(report);
    if (report.token === END) {
      found.push(joined(held, ''));
      held = [];
      continue;
    }
    const bytes = new Uint8Array(held.map((one) => one.token));
    const text = new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes, { stream: true });
    if (text) {
      found.push(joined(held, text));
      held = [];
    }
  }
  return [found, held];
}

function joined(reports, text) {
  const columns = (name) => reports[0][name].map((_, k) => reports.map((one) => one[name][k]));
  const known = (numbers) => (numbers.includes(null) ? null : sum(numbers));
  return {
    ...reports[0],
    text,
    unit: 'character',
    log_prob: known(reports.map((one) => one.log_prob)),
    pool_log_prob: known(reports.map((one) => one.pool_log_prob)),
    member_log_probs: columns('member_log_probs').map(known),
    disagreement: columns('disagreement').map(known),
    claims: columns('claims').map(mean),
  };
}

/** An element for a token, which can be chosen by pointer and keyboard. */
function tokenElement(token, k, about) {
  const said = `${visible(token.text) || 'end'}, ${token.isPut ? 'put here' : percent(token.log_prob)}`;
  const doubting = doubters(token);
  const own = owner(token);
  const made = h('span', {
    className: `tok${doubting.length ? ' doubt' : ''}${own === null ? '' : ' owned'}`,
    role: 'button',
    tabindex: k ? -1 : 0,
    'data-k': k,
    'aria-label': said + (doubting.length ? ', a member was sure of something else' : ''),
    title: said,
    vars: {
      apart: Math.min(apartness(token) / FULL.disagreement, 1).toFixed(3),
      rare: token.isPut ? 0 : Math.min(-(token.log_prob ?? -Infinity) / FULL.surprise, 1).toFixed(3),
      hue: own === null ? 0 : hueOf(about, own),
    },
  });
  const lines = (token.shown ?? token.text).split('\n');
  if (!lines.join('')) made.classList.toggle('end', lines.length === 1);
  made.append(...lines.flatMap((line, n) => (n ? [h('span', { className: 'nl' }), '\n', line] : [line])));
  return made;
}

/** The colour of a member by its number, and of files, which come behind the members. */
const hueOf = (about, k) => (k === about.members.length ? FILES : (about.hues?.[k] ?? hues(k)));
export const hues = (k) => HUES[k % HUES.length];

/** An element of a text, whose tokens are added by `add`; a chosen one is told as the event `choose`. */
export function textElement(about) {
  const made = h('div', { className: 'text', dir: 'auto' });
  made.tokens = [];
  made.elements = [];
  made.add = (tokens) => {
    const from = made.tokens.length;
    const added = tokens.map((token, k) => tokenElement(token, from + k, about));
    made.append(...added);
    made.elements.push(...added);
    made.tokens.push(...tokens);
    mark(made, from);
  };
  const choose = (element) => {
    made.querySelector('.on')?.classList.remove('on');
    element.classList.add('on');
    const k = Number(element.dataset.k);
    made.dispatchEvent(new CustomEvent('choose', { detail: { k, token: made.tokens[k] } }));
  };
  made.addEventListener('click', (event) => {
    const token = event.target.closest('.tok');
    if (token && getSelection().isCollapsed) choose(token);
  });
  made.addEventListener('keydown', (event) => {
    const token = event.target.closest('.tok');
    if (!token) return;
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const next = step && made.querySelector(`[data-k="${Number(token.dataset.k) + step}"]`);
    if (next) {
      token.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    } else if (event.key === 'Enter' || event.key === ' ') choose(token);
    if (step || event.key === 'Enter' || event.key === ' ') event.preventDefault();
  });
  return made;
}

/** What Markdown sets apart, by the class that its tokens get. */
const MARKS = {
  code: /^```[\s\S]*?(?:^```|(?![\s\S]))/gm,
  tick: /`[^`\n]+`/g,
  bold: /\*\*[^*\n]+\*\*|^#{1,6} .*$/gm,
};

/** Give tokens within code, and those in bold, their classes; they stay tokens, with all of their characters. */
function mark({ tokens, elements }, from) {
  const text = textOf(tokens);
  // Lines before that of the first new token are as they were.
  const line = text.lastIndexOf('\n', textOf(tokens.slice(0, from)).length - 1);
  const ranges = Object.entries(MARKS).map(([name, pattern]) => [
    name,
    [...text.matchAll(pattern)].map((one) => [one.index, one.index + one[0].length]),
  ]);
  let end = text.length;
  for (let k = tokens.length - 1; k >= 0 && end > line; k--) {
    const start = end - (tokens[k].shown ?? tokens[k].text).length;
    for (const [name, found] of ranges) {
      elements[k].classList.toggle(
        name,
        found.some(([first, last]) => first < end && start < last)
      );
    }
    end = start;
  }
}

/** Parts of characters, and tokens that are no text. */
const NO_WORD = /�|^\\x[0-9A-F]{2}$|^<\|.*\|>$|^<\/?s>$|^<(unk|pad|bos|eos|(start|end)_of_turn)>$/;

/** A list of a distribution's likeliest tokens, with bars. */
function card(name, rows, token, scale, notes, whatIf, hue = null) {
  const listed = rows.map(([text, nats]) => {
    const isCome = text === token.text;
    const word = h('code', {}, visible(text) || 'end');
    const canGoOn = whatIf && !isCome && text && !NO_WORD.test(text);
    const goOn = { className: 'if', title: 'Go on from here', onclick: () => whatIf(text) };
    const shown = canGoOn ? button(word, goOn) : word;
    const bar = h('i', { vars: { w: `${((100 * probability(nats)) / scale).toFixed(1)}%` } });
    return h('li', { className: isCome ? 'came' : '' }, shown, bar, h('b', { 'data-nats': nats }, percent(nats)));
  });
  return h(
    'section',
    { className: 'card' },
    h('h4', hue === null ? {} : { className: 'key', vars: { hue } }, name),
    h('ol', {}, listed),
    notes.map((note) => h('p', {}, note))
  );
}

/**
 * What stands behind a token: what the mix and each member expected, what files claimed, and what the rule changed.
 *
 * `about` has the names of members and files and the rule; `whatIf(text)` goes on with another token.
 */
export function detailsElement(token, about, whatIf = null, places = []) {
  const likeliest = [token.top, ...token.member_top].flatMap((rows) => rows.map(([, nats]) => nats ?? -Infinity));
  const scale = Math.exp(Math.max(...likeliest, -700));
  const unit = token.unit ?? 'token';
  const came = (nats, by = `this ${unit}`) => (token.isPut ? [] : [`${by}: ${percent(nats, 2)}`]);
  const average = token.moved.length ? came(token.pool_log_prob, 'by the average alone') : [];
  const cards = [card('all as one', token.top, token, scale, [...came(token.log_prob), ...average], whatIf)];
  about.members.forEach((name, k) => {
    const [own, bound] = [token.disagreement[k], token.disagreement_is_bound[k] ? 'at most ' : ''];
    const apart = `disagrees by ${bound}${own === null ? 'more than any number of' : own.toFixed(4)} nats`;
    const notes = isAsked(token, k) ? [...came(token.member_log_probs[k]), apart] : ['not asked: the gate was closed'];
    // Over bytes members' tokens may have begun before this character.
    cards.push(card(name, token.member_top[k], token, scale, notes, token.unit ? null : whatIf, hueOf(about, k)));
  });
  cards[0].classList.add('ours');
  const claims = token.claims.map((share, k) => `${about.files[k]} claimed ${percent(Math.log(share))} of the mix`);
  const doubt = doubters(token).map((k) => `${about.members[k]} was sure of ${visible(token.member_top[k][0][0])}`);
  const known = token.sources.filter((one) => one);
  const stands = known.map(({ path, line }) => `this and what is before stands in ${path}, line ${line}`);
  const put = token.isPut ? ['put here in place of what was drawn'] : [];
  const said = [...put, ...doubt, ...claims, ...stands, ...(unit === 'token' ? [] : [UNITS])];
  return h(
    'section',
    { className: 'details', 'aria-label': `Behind ${visible(token.text)}`, tabindex: -1 },
    h('h3', {}, h('code', {}, visible(token.text) || 'end'), ' ', h('small', {}, `by ${about.rule}${solved(token)}`)),
    h('div', { className: 'cards' }, cards),
    said.map((sentence) => h('p', {}, sentence)),
    places,
    moves(token, about)
  );
}

const UNITS = 'The mix goes on character by character, each model by tokens of its own: pieces of words.';

function solved(token) {
  if (token.gated) return ': the gate was closed, so the rule was not computed';
  if (!token.num_passes) return '';
  const sure = token.gap === null ? 'how near is unknown' : `within ${token.gap.toExponential(1)} nats of the optimum`;
  const proved = token.gap_is_certified && token.gap !== null ? ', certified' : '';
  return `: ${token.status}, ${sure}${proved}, ${token.num_passes.toFixed(1)} reads of all output layers`;
}

function moves(token, about) {
  if (!token.moved.some(([, before, after]) => before !== after)) return null;
  const isPushed = token.pushes.some((pushes) => pushes.some((nats) => nats));
  const names = isPushed ? [...about.members, 'all alike'] : [];
  const rows = token.moved.map(([text, before, after], k) => {
    const change = before === null || after === null ? null : after - before;
    const own = isPushed ? [...token.pushes[k], change === null ? null : change - sum(token.pushes[k])] : [];
    const nats = [change, ...own].map((x) =>
      h('td', { className: x > 0 ? 'up' : 'down' }, x === null ? '–' : (x > 0 ? '+' : '') + x.toFixed(3))
    );
    return h(
      'tr',
      {},
      h('th', {}, h('code', {}, visible(text))),
      h('td', {}, `${percent(before, 2)} → ${percent(after, 2)}`),
      nats
    );
  });
  const head = ['token', 'probability', 'change', ...names].map((name) => h('th', { scope: 'col' }, name));
  return h(
    'details',
    { className: 'moves' },
    h('summary', {}, 'What the rule moved, from the average to the answer, in nats'),
    h(
      'div',
      { className: 'scroll', tabindex: 0, role: 'group', 'aria-label': 'what the rule moved' },
      h('table', {}, h('thead', {}, h('tr', {}, head)), h('tbody', {}, rows))
    )
  );
}

const FIGURES = [
  'Surprise: how unlikely all together found what was written, in the mean; 0 is certain, 0.7 one of two, 2.3 one of ten.',
  'Disagreement: how far the models are from what they wrote together, in nats.',
  'Doubted: how often a model was sure of something else.',
].join('\n');

/** An element for such a line as `summaryOf` makes. */
export const sumElement = (text) => h('p', { className: 'sum', title: FIGURES }, text);

/** One line on a text: how many tokens, how likely, how far members were apart, what did not go well. */
export function summaryOf(tokens) {
  if (!tokens.length) return '';
  const unit = tokens[0].unit ?? 'token';
  const drawn = tokens.filter((token) => !token.isPut);
  const apart = mean(tokens.map(apartness));
  const surprise = -mean(drawn.map((token) => token.log_prob ?? -Infinity));
  const doubted = tokens.filter((token) => doubters(token).length).length;
  const said = [`${tokens.length} ${unit}s`, `surprise ${fixed(surprise, 2)} nats`];
  if (tokens[0].disagreement.length > 1) said.push(`disagreement ${fixed(apart, 3)}`);
  if (doubted) said.push(`${doubted} doubted`);
  const shares = tokens[0].claims.map((_, k) => mean(tokens.map((token) => token.claims[k])));
  for (const share of shares) said.push(`${(100 * share).toFixed(1)}% claimed by files`);
  const ends = tokens.map((token) => token.status).filter((status) => status !== 'OPTIMAL');
  for (const status of new Set(ends)) said.push(`${status} at ${ends.filter((own) => own === status).length}`);
  const fallbacks = tokens.filter((token) => token.fallback).length;
  if (fallbacks) said.push(`${fallbacks} answered by meet, as nothing agrees with every member`);
  return said.join(' · ');
}

/** Controls for what the colours mean, and what they mean; they hold for all texts in `root`. */
export function legendElement(root, about) {
  const modes = { doubt: 'Doubt', disagreement: 'Disagreement', surprise: 'Surprise', who: 'Who' };
  const told = h('span', { className: 'told' });
  const show = (mode) => {
    root.dataset.mode = mode;
    const names = [...about().members, ...(about().files.length ? ['files'] : [])];
    const keys = names.map((name, k) => h('span', { className: 'key', vars: { hue: hueOf(about(), k) } }, name));
    const sentences = {
      doubt: ['underlined: a model was sure of something else'],
      disagreement: ['the warmer, the further apart the models are; full at ½ nat'],
      surprise: ['the deeper, the less likely all together found it'],
      who: [...keys, 'plain: all alike'],
    };
    told.replaceChildren(...sentences[mode]);
  };
  const select = h(
    'select',
    { 'aria-label': 'Colours', onchange: () => show(select.value) },
    Object.entries(modes).map(([value, name]) => h('option', { value }, name))
  );
  select.value = root.dataset.mode || 'doubt';
  show(select.value);
  const made = h('p', { className: 'legend' }, 'Colours ', select, ' ', told);
  made.refresh = () => show(select.value);
  return made;
}

/** Where one of a text's tokens stands in files, with the lines around, by the stretches that the server told. */
function placesElements({ tokens = [], sources = [] }, at) {
  const [start, end] = [at, at + 1].map((count) => [...textOf(tokens.slice(0, count))].length);
  return sources
    .filter((one) => one.start < end && start < one.end)
    .flatMap(({ path, line, changed, before, after, ...one }) => [
      h('p', {}, `this stands in ${path}, line ${line}${changed ? ', which has changed since' : ''}`),
      h('pre', {}, before, h('mark', {}, [...textOf(tokens)].slice(one.start, one.end).join('')), after),
    ]);
}

/**
 * Show the details of what is chosen in a text behind it, and take those of another away.
 *
 * `turn` has, by the time that something is chosen, the text's tokens and where stretches of it stand in files.
 */
export function lookable(text, about, holder, whatIf = null, turn = {}) {
  text.addEventListener('choose', ({ detail: { k, token } }) => {
    const goOn = whatIf && ((other) => whatIf(k, other));
    const found = detailsElement(token, about, goOn, placesElements(turn, k));
    const close = () => {
      found.remove();
      text.querySelector('.on')?.focus();
    };
    found.prepend(button('×', { className: 'close', 'aria-label': 'Close', onclick: close }));
    found.addEventListener('keydown', (event) => event.key === 'Escape' && close());
    document.querySelector('.details')?.remove();
    holder.append(found);
    found.focus({ preventScroll: true });
    // It lies over the end of the view: the word stays in sight.
    text.querySelector('.on').scrollIntoView({ block: 'nearest' });
  });
}

/** Show a record, as pages that are shared hold it: turns of a conversation, or a text and its figures. */
export function showRecord(root, record) {
  const about = () => record;
  root.append(
    h('h1', {}, record.title),
    h('p', { className: 'who' }, `${record.members.join(' + ')}, by ${record.rule}`)
  );
  if (record.files.length)
    root.append(h('p', { className: 'note' }, `This page may hold text of the files ${record.files.join(', ')}.`));
  for (const note of record.notes ?? []) root.append(h('p', { className: 'note' }, note));
  if (record.figures) root.append(figuresElement(record.figures));
  root.append(legendElement(root, about));
  for (const turn of record.turns) {
    const holder = h('article', { className: `turn ${turn.role}` });
    const own = turn.about ?? record;
    const text = textElement(own);
    text.append(h('span', { className: 'prompt' }, turn.text ?? ''));
    text.add(turn.tokens ?? []);
    if (turn.tokens) lookable(text, own, holder, null, turn);
    if (turn.name) holder.append(h('h3', {}, turn.name));
    holder.append(text, sumElement(summaryOf(turn.tokens ?? [])));
    root.append(holder);
  }
}

/** A table of bits of a text, by all as one and by each member: rows of a name, bits, and bits a byte. */
export function figuresElement(figures) {
  const cell = (x, digits) => h('td', {}, x === null ? '–' : fixed(x, digits));
  const rows = figures.map(([name, bits, each]) => h('tr', {}, h('th', {}, name), cell(bits, 0), cell(each, 3)));
  const head = ['fewer is better', 'bits', 'bits a byte'].map((name) => h('th', { scope: 'col' }, name));
  return h('table', { className: 'bits' }, h('thead', {}, h('tr', {}, head)), h('tbody', {}, rows));
}
