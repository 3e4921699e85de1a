// What both graphs are made of: a canvas that fills a scrolling box, however much it could show, and a choice between a few words.

class Surface {
  // `paint` draws what lies `top` pixels below the upper end, once a frame at most.
  constructor(box, paint) {
    Object.assign(this, { box, paint, isRequested: false });
    this.canvas = element('canvas', { 'aria-hidden': 'true' });
    this.note = element('p', { className: 'empty', hidden: true });
    this.inner = element('div', {}, this.canvas);
    box.append(this.note, this.inner);
    this.context = this.canvas.getContext('2d', { alpha: false });
    box.addEventListener('scroll', () => this.request());
    store.follow((changed) => {
      if (changed.has('theme')) this.request();
    });
  }

  // There is so much to show.
  resize(contentHeight) {
    const { clientWidth: width, clientHeight: height } = this.box;
    this.inner.style.height = `${Math.max(contentHeight, height)}px`;
    this.ratio = window.devicePixelRatio || 1;
    const [wide, high] = [Math.round(width * this.ratio), Math.round(height * this.ratio)];
    if (this.canvas.width !== wide || this.canvas.height !== high) {
      Object.assign(this.canvas, { width: wide, height: high });
      Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    }
    this.request();
  }

  request() {
    if (this.isRequested) return;
    this.isRequested = true;
    requestAnimationFrame(() => {
      this.isRequested = false;
      const { context, box, ratio } = this;
      if (!ratio || this.canvas.width === 0 || this.canvas.height === 0) return;
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.fillStyle = palette.back;
      context.fillRect(0, 0, box.clientWidth, box.clientHeight);
      this.paint(context, box.scrollTop, box.clientWidth, box.clientHeight);
    });
  }

  // Scrolls until a part is seen.
  reveal(top, height) {
    const { scrollTop, clientHeight } = this.box;
    if (top < scrollTop) this.box.scrollTop = top;
    else if (top + height > scrollTop + clientHeight) this.box.scrollTop = top + height - clientHeight;
  }

  // A text instead of the picture.
  say(text) {
    this.note.hidden = text === '';
    this.inner.hidden = text !== '';
    this.note.textContent = text;
  }
}

// Draws a name as far as there is room, in a font whose characters are equally wide.
function label(context, text, x, y, room, color) {
  label.width ??= context.measureText('mmmmmmmmmm').width / 10;
  const fit = Math.floor(room / label.width);
  if (fit < 3) return;
  context.fillStyle = color;
  context.fillText(text.length <= fit ? text : `${text.slice(0, fit - 1)}…`, x, y);
}

// Buttons of which one is on.
class Choice {
  constructor(name, entries, act) {
    this.buttons = entries.map(([value, text, meaning]) => {
      const button = element('button', { type: 'button', role: 'radio', textContent: text, title: meaning, 'data-value': value });
      button.addEventListener('click', () => act(value));
      return button;
    });
    this.element = element('div', { className: 'choice', role: 'radiogroup', 'aria-label': name }, ...this.buttons);
    this.element.addEventListener('keydown', (event) => {
      const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      const next = this.buttons[(this.buttons.indexOf(event.target) + by + this.buttons.length) % this.buttons.length];
      next.focus();
      next.click();
    });
  }

  choose(value) {
    for (const button of this.buttons) {
      const isOn = button.dataset.value === value;
      button.setAttribute('aria-checked', String(isOn));
      button.tabIndex = isOn ? 0 : -1;
    }
  }
}
