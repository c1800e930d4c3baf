// Arrow keys walk along the tokens; Enter, space or a click chooses one.
const choose = (token) => {
  element.querySelectorAll('.tok.on').forEach((t) => t.classList.remove('on'));
  token.classList.add('on');
  trigger('click', {k: Number(token.dataset.k)});
};
element.addEventListener('click', (event) => {
  const token = event.target.closest('.tok');
  if (token) choose(token);
});
element.addEventListener('keydown', (event) => {
  const token = event.target.closest('.tok');
  if (!token) return;
  const tokens = [...element.querySelectorAll('.tok')];
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
  if (step) {
    const next = tokens[tokens.indexOf(token) + step];
    if (next) { token.tabIndex = -1; next.tabIndex = 0; next.focus(); }
    event.preventDefault();
  } else if (event.key === 'Enter' || event.key === ' ') {
    choose(token);
    event.preventDefault();
  }
});
