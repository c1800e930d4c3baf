// The settings of what is asked: who answers, how much each counts, by which rule, and how tokens are drawn.

import { kept, key } from './api.js';
import { h, hues } from './look.js';

// The most log-probabilities that an answer may have; the most tokens of one unless another number is chosen.
const LISTED = 2 ** 20;
const LENGTH = 512;

const field = (label, input, more = null) => h('label', { className: 'field' }, h('span', {}, label), input, more);

function slider(id, label, value, { min = 0, max = 1, step = 0.05 } = {}) {
  const shown = h('output', {}, String(value));
  const input = h('input', { id, type: 'range', min, max, step, value, oninput: () => (shown.value = input.value) });
  input.value = value;
  return { input, element: field(label, input, shown) };
}

/**
 * Make the settings' panel for the served ensembles.
 *
 * Returns what reads them: `body()`, the fields of a request that differ from the ensemble's own, so that a server which
 * lets nothing be changed accepts it; `about()`, who answers it; `system()`, its first messages; and `facts()`.
 */
export function controlsOf(root, served, onChange) {
  const own = {}; // of the chosen ensemble
  const many = h('div', { id: 'of-ensemble' });
  const names = served.map((one) => h('option', { value: one.id }, one.id));
  const ensemble = h('select', { id: 'ensemble', onchange: () => choose() }, names);
  const system = h('textarea', { id: 'system', rows: 2, placeholder: 'You are …' });
  const temperature = slider('temperature', 'Temperature', 0.7, { max: 2 });
  const length = h('input', { id: 'length', type: 'number', min: 1, value: LENGTH });
  const seed = h('input', { id: 'seed', type: 'number', min: 0, step: 1, placeholder: 'another each time' });
  const password = h('input', { id: 'key', type: 'password', autocomplete: 'off', value: key.get() });
  password.addEventListener('change', () => key.set(password.value));
  root.replaceChildren(
    field('Ensemble', ensemble),
    many,
    field('System message', system),
    temperature.element,
    field('Most tokens', length),
    field('Seed', seed),
    h('form', { onsubmit: (event) => event.preventDefault() }, field('API key, kept in this tab', password))
  );

  function choose() {
    const facts = served.find((one) => one.id === ensemble.value).softmeet;
    own.facts = facts;
    const may = (name) => facts.may_change.includes(name);
    own.members = [...facts.members, ...(facts.files ?? [])].map((name, k) => {
      const box = h('input', {
        id: `member-${k}`,
        type: 'checkbox',
        checked: true,
        onchange: () => [fit(), onChange()],
      });
      return { name, box };
    });
    own.weights = (facts.weights ?? []).map((weight, k) => {
      const max = Math.max(1, ...facts.weights);
      const made = slider(`weight-${k}`, `Weight of ${facts.members[k]}`, Number(weight.toFixed(2)), {
        max,
        step: 0.01,
      });
      return { ...made, first: made.input.value };
    });
    const ordered = [...new Set([facts.rule, ...Object.keys(facts.rules)])];
    const rules = ordered.map((name) => h('option', { value: name }, name));
    own.rule = h('select', { id: 'rule', disabled: !may('rule'), onchange: () => [fit(), onChange()] }, rules);
    own.rule.value = facts.rule;
    const trust = typeof facts.trust?.[0] === 'number' ? facts.trust[0] : 1;
    own.trust = slider('trust', 'Trust', Math.min(trust, 4), { max: 4 });
    own.trust.element.title =
      'How far the answer may move from the average to where all models agree; 0 is the average.';
    own.trust.first = own.trust.input.value;
    const isMany = facts.members.length > 1;
    many.replaceChildren(
      h(
        'fieldset',
        { id: 'members' },
        h('legend', {}, 'Members'),
        own.members.map(({ name, box }) => h('label', {}, box, name))
      ),
      ...(isMany && may('weights') ? own.weights.map(({ element }) => element) : []),
      ...(isMany ? [field('Rule', own.rule)] : []),
      ...(may('trust') ? [own.trust.element] : [])
    );
    // Half of a context is for what is asked.
    length.max = Math.min(facts.max_tokens, facts.context ? Math.floor(facts.context / 2) : facts.max_tokens);
    length.value = most();
    fit();
    onChange();
  }

  function fit() {
    const idle = own.facts.rules[own.rule.value] ?? [];
    own.trust.element.hidden = idle.includes('trust');
    // Somebody has to answer.
    const models = own.members.slice(0, own.facts.members.length).filter(({ box }) => box.checked);
    for (const { box } of own.members) {
      box.disabled = !own.facts.may_change.includes('members') || (models.length === 1 && models[0].box === box);
    }
  }

  /** The most tokens of an answer, whatever was typed. */
  function most() {
    return Math.min(Math.max(Math.floor(Number(length.value)) || LENGTH, 1), Number(length.max));
  }

  const chosen = () => own.members.filter(({ box }) => box.checked).map(({ name }) => name);

  /** What is asked under `softmeet`: what differs from the ensemble's own, and a report of every token. */
  function ours(changes = {}) {
    const { facts } = own;
    const wanted = changes.members ?? chosen();
    // The server bounds what an answer may report; over bytes a token may have many.
    const room = facts.vocabulary === 'bytes' ? LISTED / (most() * 20 * (wanted.length + 2)) : 10;
    const found = { report: Math.max(Math.min(Math.floor(room), 10), 1) };
    if (wanted.length !== own.members.length) found.members = wanted;
    const rule = changes.rule ?? own.rule.value;
    if (rule !== facts.rule) found.rule = rule;
    const counted = own.weights.filter((_, k) => wanted.includes(facts.members[k]));
    if (counted.length > 1 && counted.some(({ input, first }) => input.value !== first)) {
      found.weights = counted.map(({ input }) => Number(input.value));
    }
    const isIdle = (facts.rules[rule] ?? []).includes('trust');
    if (!isIdle && own.trust.input.value !== own.trust.first) found.trust = Number(own.trust.input.value);
    if (facts.sources && (facts.files ?? []).some((name) => wanted.includes(name))) found.sources = true;
    return found;
  }

  /** The fields of a request. */
  function body(changes = {}) {
    return {
      model: ensemble.value,
      temperature: Number(temperature.input.value),
      max_tokens: most(),
      seed: Number(seed.value || Math.floor(Math.random() * 2 ** 32)),
      softmeet: ours(changes),
    };
  }

  /** Who answers a request by its body: members with their colours, files and rule, by name. */
  function about(asked = body()) {
    const { facts } = own;
    const wanted = asked.softmeet.members ?? [...facts.members, ...(facts.files ?? [])];
    const members = facts.members.filter((name) => wanted.includes(name));
    return {
      members,
      hues: members.map((name) => hues(facts.members.indexOf(name))),
      files: (facts.files ?? []).filter((name) => wanted.includes(name)),
      rule: asked.softmeet.rule ?? facts.rule,
    };
  }

  /** Have what was set before a reload, where it fits what is served. */
  function restore(set) {
    if (served.some((one) => one.id === set.ensemble)) ensemble.value = set.ensemble;
    choose();
    for (const [id, value] of Object.entries(set)) {
      const one = id === 'ensemble' || id === 'key' ? null : root.querySelector(`[id="${CSS.escape(id)}"]`);
      if (!one || (one.tagName === 'SELECT' && ![...one.options].some((option) => option.value === value))) continue;
      if (one.type === 'checkbox') one.checked = value;
      else one.value = value;
      one.dispatchEvent(new Event('input'));
    }
    fit();
    onChange();
  }

  restore(kept.get('settings') ?? {});
  root.addEventListener('change', () => {
    const every = [...root.querySelectorAll('[id]:is(input, select, textarea):not(#key)')];
    kept.set(
      'settings',
      Object.fromEntries(every.map((one) => [one.id, one.type === 'checkbox' ? one.checked : one.value]))
    );
  });
  const messages = () => (system.value.trim() ? [{ role: 'system', content: system.value.trim() }] : []);
  return { body, about, facts: () => own.facts, system: messages };
}
