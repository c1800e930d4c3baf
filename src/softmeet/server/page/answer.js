// One answer while it is written: its events become tokens with texts, each whole characters.

import { streamed } from './api.js';
import { characters, textOf } from './look.js';

/** A text up to one of its tokens, in whose place another is put: the tokens, and the sources before it. */
export function instead({ tokens, sources }, at, other) {
  const before = tokens.slice(0, at);
  const size = [...textOf(before)].length;
  return {
    tokens: [...before, { ...tokens[at], text: other, shown: other, sources: [], isPut: true }],
    sources: sources.filter((one) => one.end <= size),
  };
}

/**
 * Ask for an answer, and tell of its tokens as they come.
 *
 * `onTokens(tokens)` gets new tokens, some times a second; `begun` has tokens and sources of the text that it goes on
 * with. Returns the text, all tokens and sources, what the server used, and a sentence on speed; where it is stopped,
 * what came until then.
 */
export async function answered(path, body, signal, onTokens, begun = { tokens: [], sources: [] }) {
  const size = [...textOf(begun.tokens)].length;
  const found = { tokens: [...begun.tokens], sources: [...begun.sources], used: {}, finish: null, error: null };
  const started = performance.now();
  const cutter = cutterOf();
  let first = null;
  let fresh = [];
  let isAsked = false;
  const show = () => {
    isAsked = false;
    if (fresh.length) onTokens(fresh);
    fresh = [];
  };
  try {
    for await (const event of streamed(path, body, signal)) {
      if (event.softmeet) found.used = event.softmeet;
      const choice = event.choices?.[0];
      if (!choice) continue;
      const said = choice.delta?.content ?? choice.text ?? '';
      const tokens = cutter.cut(choice.softmeet?.tokens ?? [], said, found.used.vocabulary === 'bytes');
      if (tokens.length) first ??= performance.now();
      found.tokens.push(...tokens);
      fresh.push(...tokens);
      for (const one of choice.softmeet?.sources ?? []) {
        found.sources.push({ ...one, start: one.start + size, end: one.end + size });
      }
      found.finish = choice.finish_reason ?? found.finish;
      if (fresh.length && !isAsked) {
        isAsked = true;
        // A frame never comes while the tab is hidden.
        if (document.hidden) setTimeout(show, 100);
        else requestAnimationFrame(show);
      }
    }
  } catch (error) {
    if (error.name !== 'AbortError') found.error = error;
  }
  const rest = cutter.rest(found.finish);
  found.tokens.push(...rest);
  fresh.push(...rest);
  show();
  const count = found.tokens.length - begun.tokens.length;
  const rate = (1000 * (count - 1)) / (performance.now() - first);
  const wait = (first - started) / 1000;
  found.speed = count > 1 ? `${rate.toFixed(1)} a second, the first after ${wait.toFixed(1)} s` : '';
  found.isEmpty = !count;
  return { ...found, text: textOf(found.tokens) };
}

/** Give tokens the texts that the stream has for them: a single token may be half a character, or lack its space. */
function cutterOf() {
  let held = [];
  const cut = (tokens, said, areBytes) => {
    if (areBytes) {
      const [whole, left] = characters([...held, ...tokens]);
      held = left;
      return whole;
    }
    held.push(...tokens);
    if (!said) return [];
    const found = [];
    let left = said;
    while (held.length > 1) {
      const own = [held[0].text, ` ${held[0].text}`].find((text) => text.trim() && left.startsWith(text));
      if (own === undefined) break;
      found.push({ ...held.shift(), shown: own });
      left = left.slice(own.length);
    }
    if (held.length) found.push({ ...held.at(-1), shown: left });
    held = [];
    return found;
  };
  // What ends a text, a token or a string, is no part of it.
  const rest = (finish) => held.splice(0).map((token) => (finish === 'stop' ? { ...token, shown: '' } : token));
  return { cut, rest };
}

/** What a text is worth, by all as one and by each member: rows of a name, bits, and bits a byte; null if unknown. */
export function figuresOf(tokens, members, text) {
  const size = Math.max(new TextEncoder().encode(text).length, 1);
  const bits = (numbers) => (numbers.includes(null) ? null : -numbers.reduce((all, x) => all + x, 0) / Math.LN2);
  const own = members.map((name, k) => [name, bits(tokens.map((token) => token.member_log_probs[k]))]);
  const rows = [['all as one', bits(tokens.map((token) => token.log_prob))], ...own];
  return rows.map(([name, all]) => [name, all, all === null ? null : all / size]);
}
