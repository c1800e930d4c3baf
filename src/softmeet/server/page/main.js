// The page: three views of the served ensembles, and the settings that they share.

import { kept, key, models } from './api.js';
import { chatOf } from './chat.js';
import { compareOf } from './compare.js';
import { controlsOf } from './controls.js';
import { insideOf } from './inside.js';
import { h, legendElement } from './look.js';
import { save } from './share.js';

const WIDE = '(min-width: 901px)';
const VIEWS = ['chat', 'inside', 'compare'];
const by = (id) => document.getElementById(id);
const state = {
  trouble,
  share: (record) => save(record).catch(trouble),
  refresh: () => by('legend').firstChild?.refresh(),
};
const views = {};

function trouble(error) {
  by('trouble').textContent = (error?.status === 401 && refused()) || (error?.message ?? '');
  by('trouble').hidden = !error;
  if (error?.status === 401) {
    openSettings(true);
    by('key')?.focus();
  }
}

const refused = () => key.get() && 'The server does not accept this API key: ';

function show(name, focus = true) {
  for (const view of VIEWS) {
    by(view).hidden = view !== name;
    by(`tab-${view}`).ariaSelected = String(view === name);
    by(`tab-${view}`).tabIndex = view === name ? 0 : -1;
  }
  history.replaceState(null, '', `#${name}`);
  state.refresh();
  if (focus) views[name]?.focus();
}

function openSettings(isOpen) {
  document.body.classList.toggle('with-settings', isOpen);
  by('settings-toggle').ariaExpanded = String(isOpen);
  if (isOpen && !matchMedia(WIDE).matches) by('settings').querySelector('select, input')?.focus();
}

async function start() {
  let served;
  try {
    served = await models();
    trouble(null);
  } catch (error) {
    askForKey(error);
    return;
  }
  const refresh = () => {
    state.refresh();
    views.compare?.refresh();
  };
  state.controls = controlsOf(by('settings'), served, refresh);
  views.chat = chatOf(by('chat'), state);
  views.inside = insideOf(by('inside'), state);
  views.compare = compareOf(by('compare'), state);
  // Whoever had a part in what is shown, or would have.
  const about = () =>
    views[VIEWS.find((view) => !by(view).hidden)]?.about?.() || state.controls.about({ softmeet: {} });
  by('legend').replaceChildren(legendElement(document.body, about));
  const asked = location.hash.slice(1);
  show(VIEWS.includes(asked) ? asked : served[0].softmeet.chat ? 'chat' : 'inside');
}

/** Without the models there is nothing to set but the key. */
function askForKey(error) {
  const again = h('button', { type: 'button', onclick: start }, 'Try again');
  by('settings').replaceChildren();
  trouble(error);
  by('trouble').append(' ', again);
  if (error.status !== 401) return;
  const keyField = h('input', { id: 'key', type: 'password', autocomplete: 'off', 'aria-label': 'API key' });
  keyField.addEventListener('change', () => {
    key.set(keyField.value);
    start();
  });
  const asked = refused() || 'This server asks for an API key, which is kept in this tab: ';
  by('trouble').replaceChildren(asked, keyField);
  keyField.focus();
}

for (const view of VIEWS) by(`tab-${view}`).addEventListener('click', () => show(view));
document.querySelector('[role=tablist]').addEventListener('keydown', (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const k = VIEWS.findIndex((view) => !by(view).hidden);
  const next = VIEWS[(k + step + VIEWS.length) % VIEWS.length];
  show(next, false);
  by(`tab-${next}`).focus();
});
by('settings-toggle').addEventListener('click', () => openSettings(!document.body.classList.contains('with-settings')));
// On a phone they lie over the view.
document.addEventListener('pointerdown', ({ target }) => {
  const isOver = !matchMedia(WIDE).matches && !target.closest('#settings, #settings-toggle');
  if (isOver) openSettings(false);
});
by('theme').addEventListener('click', () => {
  const { dataset } = document.documentElement;
  const now = dataset.theme ?? (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');
  dataset.theme = now === 'dark' ? 'light' : 'dark';
  kept.set('theme', dataset.theme);
});
if (kept.get('theme')) document.documentElement.dataset.theme = kept.get('theme');
openSettings(matchMedia(WIDE).matches);
start();
