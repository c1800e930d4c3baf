// One answer while it is written: its events become tokens with texts, each whole characters.

import { streamed } from './api.js';
import { characters } from './look.js';

/**
 * Ask for an answer, and tell of its tokens as they come.
 *
 * `onTokens(tokens)` gets new tokens, some times a second. Returns the text, all tokens, seconds and what the server
 * used; where it is stopped, what came until then.
 */
export async function answered(path, body, signal, onTokens) {
  const found = { text: '', tokens: [], used: {}, sources: [], finish: null, seconds: 0, first: null, error: null };
  const started = performance.now();
  const cutter = cutterOf();
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
      found.text += said;
      const tokens = cutter.cut(choice.softmeet?.tokens ?? [], said, found.used.vocabulary === 'bytes');
      if (tokens.length) found.first ??= performance.now() - started;
      found.tokens.push(...tokens);
      fresh.push(...tokens);
      found.sources.push(...(choice.softmeet?.sources ?? []));
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
  found.seconds = (performance.now() - started) / 1000;
  return found;
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

/** What a text is worth, by all as one and by each member: rows of a name, bits, and bits a byte. */
export function figuresOf(tokens, members, text) {
  const size = Math.max(new TextEncoder().encode(text).length, 1);
  const bits = (numbers) => (numbers.includes(null) ? null : -numbers.reduce((all, x) => all + x, 0) / Math.LN2);
  const own = members.map((name, k) => [name, bits(tokens.map((token) => token.member_log_probs[k]))]);
  const rows = [['all as one', bits(tokens.map((token) => token.log_prob))], ...own];
  return rows.map(([name, all]) => [name, all, all === null ? null : all / size]);
}
