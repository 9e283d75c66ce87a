// Move λ and μ: one module for notebooks, through anywidget, and for the book's page. It shows a precomputed grid at once; where
// the page brings an ONNX solver and onnxruntime-web, the solver itself then takes over, and nothing leaves the browser.

const SIZE = 64, PIXELS = SIZE * SIZE;
const LARGEST = 1024; // pixels of a photo's shorter side
const USE = "../book/use.html#a-picture-to-end-with"; // from the book's page
// Where aligned CelebA, cropped as data.prepare() crops it, has eyes and mouth: parts of the width and height.
const EYES = [[0.365, 0.515], [0.63, 0.515]], MOUTH = [0.39, 0.61, 0.79];

// ---- Measurements, number for number as flowlib.operators makes them ----

// Standard normal numbers from a counter and an integer hash, the same in every language.
function normals(seed, length) {
  const uniform = (i) => {
    const a = (Math.imul(seed + 1, 0x9e3779b9) + Math.imul(i + 1, 0x6d2b79f5)) | 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  return Float32Array.from({ length }, (_, i) =>
    Math.sqrt(-2 * Math.log(1 - uniform(2 * i))) * Math.cos(2 * Math.PI * uniform(2 * i + 1)));
}

function squareMask(width) {
  const start = (SIZE - width) >> 1, inside = (i) => i >= start && i < start + width;
  return Float32Array.from({ length: PIXELS }, (_, i) => (inside(Math.floor(i / SIZE)) && inside(i % SIZE) ? 0 : 1));
}

// The matrix of a circular Gaussian blur along one axis.
function blurMatrix(sigma, kernelSize) {
  const radius = kernelSize >> 1, matrix = new Float32Array(PIXELS);
  const kernel = Array.from({ length: kernelSize }, (_, i) => Math.exp(-0.5 * ((i - radius) / sigma) ** 2));
  const sum = kernel.reduce((a, b) => a + b);
  for (let row = 0; row < SIZE; row++)
    kernel.forEach((value, i) => { matrix[row * SIZE + (row + i - radius + SIZE) % SIZE] += value / sum; });
  return matrix;
}

function blurred(x, matrix) {
  const once = (source, stride, step) => {
    const result = new Float32Array(source.length);
    for (let channel = 0; channel < 3; channel++)
      for (let line = 0; line < SIZE; line++)
        for (let i = 0; i < SIZE; i++) {
          let sum = 0;
          for (let j = 0; j < SIZE; j++)
            if (matrix[i * SIZE + j]) sum += matrix[i * SIZE + j] * source[channel * PIXELS + line * stride + j * step];
          result[channel * PIXELS + line * stride + i * step] = sum;
        }
    return result;
  };
  return once(once(x, SIZE, 1), 1, SIZE);
}

function psnr(a, b) {
  let sum = 0;
  for (let i = 0; i < b.length; i++) sum += (a[i] - b[i]) ** 2;
  return -10 * Math.log10(sum / b.length);
}

// ---- The solver's file, as weights.py packs it ----

async function unpacked(address) {
  const answer = await fetch(address).catch(() => ({ status: "no answer" }));
  if (!answer.ok) throw new Error(`reload this page: its file could not be fetched (${answer.status})`);
  const stream = answer.body.pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer().catch(() => { throw new Error("reload this page: its file is cut off or broken"); });
  const bytes = new Uint8Array(buffer), start = 4 + new DataView(buffer).getUint32(0, true);
  const { length, rest, tensors } = JSON.parse(new TextDecoder().decode(bytes.subarray(4, start)));
  const whole = new Uint8Array(length), codes = bytes.subarray(start + rest), plane = codes.length / 3;
  let taken = start, used = 0, end = 0;
  for (const { start: at, count, folds, step } of tensors) {
    whole.set(bytes.subarray(taken, taken + at - end), end);
    const values = new Float32Array(count), steps = new Int32Array(count / folds); // a fold is counted from the one before
    for (let i = 0, j = 0; i < count; i++, j = j + 1 === steps.length ? 0 : j + 1) {
      const zigzag = codes[used + i] | codes[plane + used + i] << 8 | codes[2 * plane + used + i] << 16;
      values[i] = (steps[j] += (zigzag >>> 1) ^ -(zigzag & 1)) * step;
    }
    whole.set(new Uint8Array(values.buffer), at);
    [taken, used, end] = [taken + at - end, used + count, at + 4 * count];
  }
  whole.set(bytes.subarray(taken, start + rest), end);
  return whole;
}

// ---- Small helpers ----

function element(tag, properties = {}, ...children) {
  const { class: name, ...rest } = properties, node = document.createElement(tag);
  if (name) node.className = name;
  Object.entries(rest).forEach(([key, value]) => (key in node ? (node[key] = value) : node.setAttribute(key, value)));
  node.append(...children);
  return node;
}

const newCanvas = (label) => element("canvas", { width: SIZE, height: SIZE, role: "img", "aria-label": label });

function draw(canvas, x) {
  const context = canvas.getContext("2d"), data = context.createImageData(SIZE, SIZE);
  for (let i = 0; i < PIXELS; i++) {
    for (let c = 0; c < 3; c++) data.data[4 * i + c] = Math.round((x[c * PIXELS + i] + 0.5) * 255);
    data.data[4 * i + 3] = 255;
  }
  context.putImageData(data, 0, 0);
}

// The picture of a drawable in a square, as (3, 64, 64) numbers in [-0.5, 0.5]; transparent parts become white.
function pixels(drawable, left, top, side) {
  let context;
  // Halving until the last step keeps large photos free of aliasing.
  for (let size = side, source = drawable; !context || size > SIZE;) {
    const target = Math.max(SIZE, Math.ceil(size / 2));
    context = element("canvas", { width: target, height: target }).getContext("2d");
    context.imageSmoothingQuality = "high";
    context.fillStyle = "white";
    context.fillRect(0, 0, target, target);
    context.drawImage(source, left, top, size, size, 0, 0, target, target);
    [source, left, top, size] = [context.canvas, 0, 0, target];
  }
  const { data } = context.getImageData(0, 0, SIZE, SIZE);
  return Float32Array.from({ length: 3 * PIXELS }, (_, i) => data[4 * (i % PIXELS) + Math.floor(i / PIXELS)] / 255 - 0.5);
}

// Whether this browser gives back what was drawn: with some settings for privacy, it gives noise.
function readsBack() {
  const known = Float32Array.from({ length: 3 * PIXELS }, (_, i) => (37 * i % 256) / 255 - 0.5), canvas = newCanvas("");
  draw(canvas, known);
  try {
    return psnr(pixels(canvas, 0, 0, SIZE), known) > 45;
  } catch {
    return false;
  }
}

async function loadImage(url) {
  const image = element("img", { src: url });
  await image.decode();
  return image;
}

// A photo, with at most LARGEST pixels on its shorter side so that dragging stays smooth.
async function decoded(file) {
  const whole = await createImageBitmap(file), shrink = LARGEST / Math.min(whole.width, whole.height);
  if (shrink >= 1) return whole;
  const [resizeWidth, resizeHeight] = [whole.width, whole.height].map((v) => Math.round(v * shrink));
  return createImageBitmap(whole, { resizeWidth, resizeHeight, resizeQuality: "high" }).finally(() => whole.close());
}

const number = (value, digits) => value.toFixed(digits).replace("-", "−");
const signed = (value, digits) => (value < 0 ? "" : "+") + number(value, digits);
// A perfect answer has no error: its PSNR is infinite.
const decibels = (value) => (Number.isFinite(value) ? `${number(value, 2)} dB` : value === Infinity ? "exact" : "not finite");

// A line plot of PSNR over one slider: hollow mark at the trained value, full one where the sliders are. Undefined values are
// not yet known. Triangles on the edge stand for values beyond it: those far below the best, and those that are not finite.
function curve(svg, positions, values, trained, now, label) {
  const good = [...values, now.y].filter(Number.isFinite), high = Math.max(...(good.length ? good : [0])) + 0.5;
  const low = Math.min(Math.max(Math.min(...good, high) - 0.5, high - 16), high - 3);
  const x = (p) => 34 + 150 * (p - positions[0]) / (positions.at(-1) - positions[0]);
  const y = (v) => 8 + 70 * (high - Math.min(high, Math.max(low, Number.isNaN(v) ? low : v))) / (high - low);
  const known = [...positions.map((p, i) => [p, values[i]]), [now.x, now.y]].filter(([, v]) => v !== undefined);
  const beyond = known.filter(([, v]) => !(v >= low && v <= high)), isBelow = (v) => !(v > high);
  const triangles = beyond.map(([p, v]) => `<path class="beyond" d="M${x(p) - 4} ${y(v) + (isBelow(v) ? 3 : -3)}h8l-4 ${isBelow(v) ? 7 : -7}z"/>`);
  const ticks = [[high - 0.5, ""], [(high + low) / 2, ""], ...(beyond.some(([, v]) => isBelow(v)) ? [[low, "≤ "]] : [])].map(([v, sign]) =>
    `<text x="30" y="${y(v) + 3}" text-anchor="end">${sign}${number(v, 0)}</text><path d="M34 ${y(v)}H184" class="grid"/>`);
  const at = positions.reduce((best, p, i) => (Math.abs(p - trained) < Math.abs(positions[best] - trained) ? i : best), 0);
  const points = positions.flatMap((p, i) => (values[i] === undefined ? [] : `${x(p)},${y(values[i])}`));
  const mark = values[at] === undefined ? "" : `<rect class="trained" x="${x(trained) - 6}" y="${y(values[at]) - 6}" width="12" height="12"/>`;
  svg.innerHTML = `${ticks.join("")}<polyline points="${points.join(" ")}"/>${mark}${triangles.join("")}
    <circle cx="${x(now.x)}" cy="${y(now.y)}" r="4.5"/>
    ${[positions[0], trained, positions.at(-1)].map((p) => `<text x="${x(p)}" y="94" text-anchor="middle">${String(p).replace("-", "−")}</text>`).join("")}
    <text x="109" y="105" text-anchor="middle">${label}</text>`;
}

// ---- The explorer ----

class Explorer {
  constructor(config, root, place) {
    const bytes = Uint8Array.from(atob(config.originals), (c) => c.charCodeAt(0));
    this.originals = config.labels.map((_, k) => Float32Array.from(bytes.subarray(3 * PIXELS * k, 3 * PIXELS * (k + 1)), (v) => v / 255 - 0.5));
    Object.assign(this, { config, root, place, sessions: {}, live: false, busy: false, generation: 0, turn: 0, strokes: [], lastOnly: true });
    this.build();
    this.thumbnails.forEach((canvas, i) => draw(canvas, this.originals[i]));
    this.chooseImage(0);
    this.chooseTask(config.tasks[0].task);
  }

  build() {
    const { config, root } = this;
    const radios = (name, items, choose, chosen = items[0][0]) => items.map(([value, content = value]) => {
      const input = element("input", { type: "radio", name: `${name}-${root.id}`, value, checked: value === chosen, autocomplete: "off" });
      input.addEventListener("change", () => choose(value));
      return element("label", {}, input, content);
    });
    const button = (text, act) => {
      const node = element("button", { type: "button", textContent: text });
      node.addEventListener("click", act);
      return node;
    };
    const slider = (label, range, act, text = () => "") => {
      const input = element("input", { type: "range", ...range, "aria-label": label }), output = element("output");
      const show = (words) => { output.textContent = words; input.setAttribute("aria-valuetext", words); };
      input.addEventListener("input", () => { show(text(Number(input.value))); act(Number(input.value)); });
      show(text(range.value));
      return { input, show, row: element("label", { class: "slider" }, element("span", { textContent: label }), input, output) };
    };
    Object.assign(this, { radios, button, slider });

    this.taskChoice = element("div", { class: "pills tasks", role: "radiogroup", "aria-label": "Task" },
      ...radios("task", config.tasks.map((t) => [t.task, element("span", {}, t.label,
        element("small", { class: "live", textContent: ` ${t.megabytes} MB` }))]), (t) => this.chooseTask(t)));
    this.about = element("p", { class: "about" });
    this.thumbnails = config.labels.map((label) => newCanvas(label));
    this.imageChoice = element("div", { class: "images", role: "radiogroup", "aria-label": "Image" },
      ...radios("image", this.thumbnails.map((canvas, i) => [i, canvas]), (i) => this.chooseImage(i)));
    const file = element("input", { type: "file", accept: "image/*" });
    file.addEventListener("change", () => { this.takePhoto(file.files[0]); file.value = ""; });
    this.own = element("label", { class: "own live" }, "Your photo…", file);
    this.problem = element("p", { class: "problem", role: "alert" });
    this.buildCrop();
    this.bindPlace();

    this.canvases = { measurement: newCanvas("Measurement"), estimate: newCanvas("Reconstruction"), original: newCanvas("Original") };
    this.captions = { measurement: element("span"), estimate: element("strong"), original: element("span") };
    const panels = Object.entries(this.canvases).map(([name, canvas]) => element("div", { class: `panel ${name}` }, canvas,
      element("div", { class: "caption" }, canvas.getAttribute("aria-label"), element("br"), this.captions[name])));
    this.bindPainting(this.canvases.measurement);

    const { scales, shifts } = config;
    this.common = {
      mu: slider("step size μ", { min: scales[0], max: scales.at(-1) }, (v) => this.moveAll(v, this.shift)),
      lambda: slider("shrinkage λ", { min: shifts[0], max: shifts.at(-1) }, (v) => this.moveAll(this.scale, v)),
    };
    this.reset = button("Trained values", () => {
      if (!this.live) this.strokes = []; // there is no button to clear them
      this.restore();
    });
    const svg = () => { const node = document.createElementNS("http://www.w3.org/2000/svg", "svg"); node.setAttribute("viewBox", "0 0 190 110"); return node; };
    this.curves = { mu: svg(), lambda: svg() };
    this.plots = element("div", { class: "curves" }, this.curves.mu, this.curves.lambda);
    this.controls = element("div", { class: "controls live" });
    this.foldStrip = element("div", { class: "folds live" });
    this.each = element("details", { class: "each live" }, element("summary", { textContent: "Each fold on its own" }));
    this.status = element("p", { class: "status", role: "status" });
    root.replaceChildren(this.taskChoice, element("div", { class: "choices" }, this.imageChoice, this.own, this.cropAgain, this.problem),
      this.status, this.cropper, element("div", { class: "panels" }, ...panels),
      this.controls, element("div", { class: "sliders" }, this.common.mu.row, this.common.lambda.row, this.reset),
      this.plots, this.foldStrip, this.each, this.about);
  }

  // Files are dropped or pasted anywhere in the place, and Escape closes the dialog even if the page's scripts use that key.
  bindPlace() {
    const { root, place } = this, listen = (name, act) => place.addEventListener(name, act, true);
    const isMine = ({ target }) => (target.closest?.(".flow-explorer") ?? document.querySelector(".flow-explorer")) === root;
    const dragging = (event) => {
      if (!event.dataTransfer?.types.includes("Files") || !isMine(event)) return;
      event.preventDefault();
      root.classList.toggle("is-dragging", event.type === "dragover");
      if (event.type === "drop") this.takePhoto(event.dataTransfer.files[0]);
    };
    ["dragover", "dragleave", "drop"].forEach((name) => listen(name, dragging));
    listen("paste", (event) => { if (isMine(event)) this.takePhoto(event.clipboardData?.files[0]); });
    listen("keydown", (event) => {
      if (event.key !== "Escape" || !this.cropper.open) return;
      event.stopPropagation();
      this.cropper.close();
    });
  }

  // -- What the reader does

  async chooseTask(name) {
    const task = this.config.tasks.find((one) => one.task === name);
    this.setTask(task);
    if (!this.reason) this.goLive(task); // takes longest, so it goes first
    task.image ??= await loadImage(task.sprite).catch(() => null); // tried again when the task is chosen again
    if (task !== this.task) return;
    this.sprite = task.image;
    if (this.live) return;
    this.explain();
    this.update();
  }

  setTask(task) {
    Object.assign(this, { task, sprite: undefined, result: null });
    this.about.textContent = task.about;
    this.buildFolds();
    this.setLive(false, this.barrier());
    this.restore();
  }

  // The measurement and all scalars as they were trained; paint stays.
  restore() {
    const { task, strokes } = this;
    Object.assign(this, { sigma: task.sigma, hole: task.hole, sigmaB: task.sigma_b, seed: this.image });
    this.changed = Boolean(task.hole) && strokes.length > 0;
    this.makeMask();
    this.buildControls();
    this.root.classList.toggle("is-paintable", this.live && Boolean(this.mask));
    this.moveAll(1, 0);
  }

  // The square hole, and the paint over it: 0 where hidden, 1 where restored, nothing elsewhere.
  makeMask() {
    this.mask = this.task.hole ? squareMask(this.hole).map((v, i) => this.strokes[i] ?? v) : null;
  }

  chooseImage(index) {
    this.turn++;
    this.problem.textContent = "";
    this.setSquare(null);
    Object.assign(this, { image: index, seed: index, x: this.originals[index] });
    this.update();
  }

  // The later of two choices counts, however long the earlier one takes.
  async takePhoto(file) {
    if (!file) return;
    const turn = ++this.turn;
    const refuse = (message) => {
      this.problem.textContent = message;
      this.problem.scrollIntoView({ block: "nearest" }); // a photo may be dropped far below
    };
    this.problem.textContent = "";
    if (this.reason) return refuse(`For your own photo, ${this.reason}.`);
    if (!readsBack()) return refuse("This browser hands out noise instead of a photo’s pixels, for privacy: let this page read canvases, then choose the photo again.");
    const bitmap = await decoded(file).catch(() => null);
    if (turn !== this.turn) return bitmap?.close();
    if (!bitmap) return refuse(`“${file.name}” is no image that this browser can read. Choose a PNG, JPEG or WebP file.`);
    const { width, height } = bitmap, side = Math.min(width, height);
    this.setSquare({ bitmap, side, left: (width - side) / 2, top: (height - side) / 2 });
    this.imageChoice.querySelectorAll("input").forEach((input) => { input.checked = false; });
    this.crop();
    this.explain();
    if (!this.cropper.open) this.cropper.showModal();
  }

  // A square of a photo, or null for a face of ours. Bitmaps are large, and would stay for long.
  setSquare(square) {
    this.square?.bitmap.close();
    Object.assign(this, { square, photo: Boolean(square) });
    this.cropAgain.hidden = !square;
    if (!square) this.cropper.close();
  }

  // -- Which square of a photo

  buildCrop() {
    const { button } = this;
    this.view = element("canvas", { width: 320, height: 320, tabIndex: 0, role: "img",
      "aria-label": "The square of your photo. Arrow keys move it, plus and minus zoom." });
    this.zoom = this.slider("zoom", { min: 1, max: 8, step: 0.01, value: 1 }, (v) => this.crop(0, 0, v), (v) => `× ${v.toFixed(2)}`);
    this.cropAgain = button("Crop…", () => this.cropper.showModal());
    this.cropAgain.classList.add("live");
    this.cropAgain.hidden = true;
    this.cropper = element("dialog", { "aria-label": "Crop your photo" },
      element("p", { textContent: "Drag and zoom until the eyes lie in the circles and the mouth on the line: so lie the faces that the solvers know." }),
      this.view, this.zoom.row, button("Done", () => this.cropper.close()));
    const step = (x, y) => this.crop(x * this.square.side, y * this.square.side), zoomBy = (factor) => this.crop(0, 0, this.zoom.input.value * factor);
    let from;
    this.view.addEventListener("pointerdown", (event) => { from = event; this.view.setPointerCapture(event.pointerId); });
    this.view.addEventListener("pointermove", (event) => {
      if (!this.view.hasPointerCapture(event.pointerId)) return;
      step((from.clientX - event.clientX) / this.view.clientWidth, (from.clientY - event.clientY) / this.view.clientHeight);
      from = event;
    });
    this.view.addEventListener("wheel", (event) => { event.preventDefault(); zoomBy(Math.exp(-event.deltaY / 500)); }, { passive: false });
    const keys = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    this.view.addEventListener("keydown", (event) => {
      if (keys[event.key]) step(...keys[event.key].map((v) => v / 40));
      else if ("+=-".includes(event.key)) zoomBy(event.key === "-" ? 1 / 1.1 : 1.1);
      else return;
      event.preventDefault();
    });
  }

  // Moves the square by so many pixels of the photo, and zooms about its middle.
  crop(right = 0, down = 0, zoom = null) {
    const { bitmap, side: before, left, top } = this.square, whole = Math.min(bitmap.width, bitmap.height);
    const side = zoom === null ? before : whole / Math.min(8, Math.max(1, zoom));
    const within = (v, length) => Math.min(length - side, Math.max(0, v + (before - side) / 2));
    this.square = { bitmap, side, left: within(left + right, bitmap.width), top: within(top + down, bitmap.height) };
    this.zoom.input.value = whole / side;
    this.zoom.show(`× ${(whole / side).toFixed(2)}`);
    const context = this.view.getContext("2d"), { width } = this.view;
    context.fillStyle = "white";
    context.fillRect(0, 0, width, width);
    context.drawImage(bitmap, this.square.left, this.square.top, side, side, 0, 0, width, width);
    const marks = new Path2D();
    EYES.forEach(([x, y]) => { marks.moveTo((x + 0.06) * width, y * width); marks.arc(x * width, y * width, 0.06 * width, 0, 7); });
    marks.moveTo(MOUTH[0] * width, MOUTH[2] * width);
    marks.lineTo(MOUTH[1] * width, MOUTH[2] * width);
    [["black", 4], ["white", 2]].forEach(([strokeStyle, lineWidth]) => { Object.assign(context, { strokeStyle, lineWidth }); context.stroke(marks); });
    this.x = pixels(bitmap, this.square.left, this.square.top, side);
    this.update();
  }

  moveAll(scale, shift) {
    Object.assign(this, { scale, shift });
    this.mu = this.task.mu.map((v) => v * scale);
    this.lambda = this.task.lambda.map((v) => v + shift);
    this.update();
  }

  moveFold(kind, k, value) {
    this[kind][k] = value;
    this.update();
  }

  bindPainting(canvas) {
    const paint = (event) => {
      const box = canvas.getBoundingClientRect(), radius = 2.5;
      const column = (event.clientX - box.left) / box.width * SIZE, row = (event.clientY - box.top) / box.height * SIZE;
      for (let i = 0; i < PIXELS; i++)
        if (Math.hypot(i % SIZE + 0.5 - column, Math.floor(i / SIZE) + 0.5 - row) < radius) this.strokes[i] = this.restoring ? 1 : 0;
      this.changed = true;
      this.makeMask();
      this.update();
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (!this.live || !this.mask) return;
      canvas.setPointerCapture(event.pointerId);
      paint(event);
    });
    canvas.addEventListener("pointermove", (event) => { if (canvas.hasPointerCapture(event.pointerId)) paint(event); });
  }

  // -- Controls that depend on the task, for the live solver

  buildControls() {
    const { task, slider, button, radios } = this, change = (act) => (value) => { act(value); this.changed = true; this.update(); };
    const pills = (label, ...rest) => element("fieldset", { class: "pills", role: "radiogroup" },
      element("legend", { textContent: label }), ...radios(label, ...rest));
    const widest = Math.max(task.sigma_b, 5 * (task.kernel_size >> 1)); // where the kernel's edge is within 2 % of its middle
    const rows = {
      denoising: () => [
        slider("noise σ", { min: 0, max: 0.4, step: 0.01, value: this.sigma }, change((v) => { this.sigma = v; }), (v) => v.toFixed(2)).row,
        button("New noise", change(() => { this.seed += this.config.labels.length; }))],
      inpainting: () => [
        slider("hole", { min: 0, max: 40, step: 1, value: this.hole }, change((v) => { this.hole = v; this.makeMask(); }), (v) => `${v} × ${v}`).row,
        pills("Brush", [["hide"], ["restore"]], (v) => { this.restoring = v === "restore"; }),
        button("Clear mask", change(() => { this.strokes = []; this.makeMask(); })),
        pills("Hole told to", [["last fold"], ["all folds"]], change((v) => { this.lastOnly = v === "last fold"; }), this.lastOnly ? "last fold" : "all folds"),
        element("span", { class: "hint" }, `Paint on the measurement. Trained on one square of ${task.hole} × ${task.hole}, the solver fills `,
          "little of what is hidden outside it: ", element("a", { href: USE, textContent: "holes of other shapes" }), ".")],
      deblurring: () => [
        slider("blur σ_b", { min: 0.3, max: widest, step: 0.1, value: this.sigmaB }, change((v) => { this.sigmaB = v; }), (v) => v.toFixed(1)).row,
        element("span", { class: "hint", textContent: `The kernel has ${task.kernel_size} × ${task.kernel_size} pixels: a σ_b above ${widest} would change next to nothing.` })],
    };
    this.restoring = false;
    this.controls.replaceChildren(...rows[task.task]());
  }

  buildFolds() {
    const { task, slider } = this, largest = this.config.scales.at(-1) * Math.max(...task.mu); // the reach of the slider for all folds
    this.folds = task.mu.map((_, k) => ({ canvas: newCanvas(`Image after fold ${k + 1}`), caption: element("span") }));
    this.foldStrip.replaceChildren(...this.folds.map(({ canvas, caption }, k) =>
      element("div", { class: "panel" }, canvas, element("div", { class: "caption" }, `fold ${k + 1}`, element("br"), caption))));
    this.foldSliders = task.mu.map((_, k) => ({
      mu: slider(`μ fold ${k + 1}`, { min: 0, max: Math.max(2, largest), step: 0.01 }, (v) => this.moveFold("mu", k, v)),
      lambda: slider(`λ fold ${k + 1}`, { min: -0.5, max: 1, step: 0.005 }, (v) => this.moveFold("lambda", k, v)),
    }));
    this.each.replaceChildren(this.each.firstChild, ...this.foldSliders.flatMap((pair) => [pair.mu.row, pair.lambda.row]));
  }

  // -- Results

  measure() {
    const { task, x } = this;
    if (task.task === "denoising") {
      const noise = normals(this.seed, x.length);
      return x.map((v, i) => v + this.sigma * noise[i]);
    }
    if (task.task === "inpainting") return x.map((v, i) => v * this.mask[i % PIXELS]);
    return blurred(x, blurMatrix(this.sigmaB, task.kernel_size));
  }

  operatorData() {
    if (this.task.task === "inpainting") {
      const { task: { mu, hole }, mask, lastOnly } = this, masks = mu.map((_, k) => (lastOnly && k < mu.length - 1 ? squareMask(hole) : mask));
      return { mask: [masks.flatMap((m) => [...m]), [mu.length, 1, SIZE, SIZE]] };
    }
    return this.task.task === "deblurring" ? { blur: [blurMatrix(this.sigmaB, this.task.kernel_size), [SIZE, SIZE]] } : {};
  }

  // Draws known results at once; the live solver follows, and never more than one run waits.
  update() {
    if (!this.task || !this.x) return;
    this.generation++;
    this.moved = performance.now();
    const { x, photo, changed, lastOnly } = this, { shifts } = this.config, y = this.measure();
    if (x !== this.table?.x || lastOnly !== this.table.lastOnly || !y.every((v, i) => v === this.y[i])) // PSNR at the grid's positions: known, or to be found
      this.table = { x, lastOnly, rows: photo || changed ? shifts.map(() => []) : this.task.psnr[this.image].map((row) => row.map((v) => v ?? NaN)) };
    this.y = y;
    draw(this.canvases.measurement, this.y);
    draw(this.canvases.original, this.x);
    this.captions.measurement.textContent = decibels(psnr(this.y, this.x));
    this.captions.original.textContent = this.photo ? "your photo" : this.config.labels[this.image];
    this.showSliders();
    this.root.classList.toggle("is-waiting", this.live);
    if (this.live) this.solve();
    else if (this.sprite !== null && !this.photo && !this.changed) this.showGrid();
    else this.clear();
  }

  showSliders() {
    const { mu, lambda } = this.common, { task } = this;
    const folds = (values, common) => { // those that were moved on their own, or all as one number
      const moved = values.flatMap((v, k) => (Math.abs(v - common[k]) > 1e-9 ? [k] : []));
      if (!moved.length) return ` (mean ${number(values.reduce((a, b) => a + b) / values.length, 3)})`;
      return moved.length > 1 ? `, folds ${moved.map((k) => k + 1).join(" ")} moved` : `, fold ${moved[0] + 1} at ${number(values[moved[0]], 3)}`;
    };
    const free = this.live ? [0.01, 0.005] : [this.config.scales[1] - this.config.scales[0], this.config.shifts[1] - this.config.shifts[0]];
    [[mu, this.scale, free[0]], [lambda, this.shift, free[1]]].forEach(([s, value, step]) => { s.input.step = step; s.input.value = value; });
    mu.show(`× ${this.scale.toFixed(2)}${folds(this.mu, task.mu.map((v) => v * this.scale))}`);
    lambda.show(`${signed(this.shift, 3)}${folds(this.lambda, task.lambda.map((v) => v + this.shift))}`);
    this.foldSliders.forEach((pair, k) => ["mu", "lambda"].forEach((kind) => {
      pair[kind].input.value = this[kind][k];
      pair[kind].show(number(this[kind][k], 3));
    }));
  }

  position() {
    const { scales, shifts } = this.config, nearest = (list, v) => list.reduce((best, p, i) => (Math.abs(p - v) < Math.abs(list[best] - v) ? i : best), 0);
    return [nearest(shifts, this.shift), nearest(scales, this.scale)];
  }

  showGrid() {
    const [row, column] = this.position(), { shifts } = this.config;
    const context = this.canvases.estimate.getContext("2d");
    context.clearRect(0, 0, SIZE, SIZE);
    if (this.sprite) context.drawImage(this.sprite, column * SIZE, (this.image * shifts.length + row) * SIZE, SIZE, SIZE, 0, 0, SIZE, SIZE);
    this.showQuality(this.task.psnr[this.image][row][column] ?? NaN);
  }

  // No answer is known for this measurement: an older one would belong to another.
  clear() {
    this.value = NaN;
    this.result = null;
    [this.canvases.estimate, ...this.folds.map((fold) => fold.canvas)].forEach((canvas) => canvas.getContext("2d").clearRect(0, 0, SIZE, SIZE));
    [this.captions.estimate, ...this.folds.map((fold) => fold.caption)].forEach((caption) => { caption.textContent = "–"; });
    this.plots.classList.add("is-empty");
  }

  showQuality(value) {
    this.value = value;
    this.showCurves();
  }

  showCurves() {
    const { scales, shifts } = this.config, { rows } = this.table, [row, column] = this.position(), { value } = this;
    const difference = value - rows[shifts.indexOf(0)][scales.indexOf(1)];
    this.captions.estimate.textContent = decibels(value) + (Math.abs(difference) >= 0.005 && Number.isFinite(difference) ? ` (${signed(difference, 2)})` : "");
    this.plots.classList.remove("is-empty");
    curve(this.curves.mu, scales, scales.map((_, i) => rows[row][i]), 1, { x: this.scale, y: value }, "PSNR, dB, over the factor of μ");
    curve(this.curves.lambda, shifts, rows.map((line) => line[column]), 0, { x: this.shift, y: value }, "PSNR, dB, over the shift of λ");
  }

  // The answer to the shown measurement, with the sliders' values; then the plots' points, while nothing moves.
  async solve() {
    if (this.busy) return;
    this.busy = true;
    try {
      while (this.live && (this.result?.generation !== this.generation ? await this.answer() : await this.findPoint()));
    } catch (error) {
      this.setLive(false, `reload this page: it stopped (${error.message ?? error})`);
      this.update();
    }
    this.busy = false;
  }

  async run(mu, lambda) {
    const { ort, task } = this, tensor = (values, shape) => new ort.Tensor("float32", Float32Array.from(values), shape), K = mu.length;
    const feeds = { y: tensor(this.y, [1, 3, SIZE, SIZE]), step_size: tensor(mu, [K]), shrinkage: tensor(lambda, [K]) };
    for (const [name, [values, shape]] of Object.entries(this.operatorData())) feeds[name] = tensor(values, shape);
    return (await this.sessions[task.task]).run(feeds);
  }

  async answer() {
    const { generation, task, x } = this, started = performance.now();
    const { folds, latent_norms: norms } = await this.run(this.mu, this.lambda);
    if (task === this.task && x === this.x && this.live) this.showFolds(folds.data, norms.data, generation, performance.now() - started);
    return true;
  }

  // One point of the plots that is not known yet; false where there is none.
  async findPoint() {
    const { generation, task, table, config: { scales, shifts } } = this, [row, column] = this.position();
    const wanted = [[shifts.indexOf(0), scales.indexOf(1)], ...scales.map((_, j) => [row, j]), ...shifts.map((_, i) => [i, column])];
    const next = wanted.find(([i, j]) => table.rows[i][j] === undefined), wait = this.moved + 300 - performance.now();
    if (!next) return false;
    if (wait > 0) await new Promise((resolve) => setTimeout(resolve, wait)); // else a moving slider would wait for it
    if (generation !== this.generation) return true;
    const [i, j] = next;
    const { folds } = await this.run(task.mu.map((v) => v * scales[j]), task.lambda.map((v) => v + shifts[i]));
    table.rows[i][j] = psnr(folds.data.subarray(-3 * PIXELS), table.x);
    if (generation === this.generation) this.showCurves();
    return true;
  }

  showFolds(folds, norms, generation, milliseconds) {
    const images = this.folds.map((_, k) => folds.subarray(3 * PIXELS * k, 3 * PIXELS * (k + 1)));
    this.folds.forEach(({ canvas, caption }, k) => {
      draw(canvas, images[k]);
      caption.replaceChildren(decibels(psnr(images[k], this.x)), element("br"), `‖z̃‖ ${norms[k].toFixed(0)}`);
    });
    draw(this.canvases.estimate, images.at(-1));
    this.showQuality(psnr(images.at(-1), this.x));
    this.result = { folds, norms, generation, milliseconds };
    this.root.classList.toggle("is-waiting", generation !== this.generation);
    this.explain();
  }

  // -- From the grid to the live solver

  // Advice if this page cannot run a solver, with the reason if known beforehand.
  barrier() {
    if (!this.config.ort) return this.config.reason;
    if (location.protocol === "file:") return "serve the book (python -m http.server --directory build/html): a page opened as a file may not load it";
    if (typeof WebAssembly === "undefined") return "open this page in another browser: this one has no WebAssembly";
    return typeof DecompressionStream === "undefined" ? "open this page in a newer browser: this one is too old" : null;
  }

  // The session of a task's solver, fetched once.
  load(task) {
    const address = (path) => new URL(path, document.baseURI).href, { ort } = this.config;
    return this.sessions[task.task] ??= (async () => {
      const file = unpacked(address(task.solver));
      file.catch(() => {}); // reported below
      this.ort = await import(address(ort)).catch(() => { throw new Error("reload this page: what runs it could not be loaded"); });
      Object.assign(this.ort.env.wasm, { numThreads: 1, proxy: true, wasmPaths: address(ort).replace(/[^/]*$/, "") });
      // Its loops are small and good: optimising them takes longer than it saves.
      const options = { executionProviders: ["wasm"], graphOptimizationLevel: "disabled" };
      return this.ort.InferenceSession.create(await file, options).catch((error) => {
        throw new Error(`reload this page or open it in another browser: it could not be started (${error.message ?? error})`);
      });
    })();
  }

  async goLive(task) {
    let reason = null;
    try {
      await this.load(task);
    } catch (error) {
      delete this.sessions[task.task]; // tried again when the task is chosen again
      reason = error.message ?? String(error);
    }
    if (task !== this.task) return;
    this.setLive(!reason, reason);
    this.update();
  }

  // reason: advice if the solver cannot run; null while it loads and once it is loaded.
  setLive(live, reason) {
    const { root } = this;
    Object.assign(this, { live, reason });
    root.classList.toggle("is-live", live);
    root.classList.toggle("may-live", !reason);
    root.classList.toggle("is-paintable", live && Boolean(this.mask));
    [this.controls, this.foldStrip, this.each].forEach((part) => { part.inert = !live; });
    this.explain();
  }

  // The line of state.
  explain() {
    const { task, config, live, reason, sprite, photo, result } = this, missing = sprite === null;
    const grid = sprite === undefined ? "Loading precomputed pictures…"
      : missing ? `Nothing to show: the precomputed pictures (${task.task}) could not be loaded.`
      : `Precomputed pictures, for ${config.scales.length} × ${config.shifts.length} positions of the sliders.`;
    const meanwhile = photo ? "Your photo is next." : missing ? "" : "Until then the sliders choose among precomputed pictures.";
    if (reason) this.status.textContent = `${grid} For the solver itself and your own photo, ${reason}.`;
    else if (!live) this.status.textContent = `Loading the solver, ${task.megabytes} MB… ${meanwhile}`;
    else if (!result) this.status.textContent = "The solver is loaded and works on its first answer…";
    else this.status.textContent = `Live: the solver runs in your browser, ${result.milliseconds.toFixed(0)} ms for this image. Nothing you load leaves it.`;
  }
}

// A page may have several, each with its own copy of this module: a random number tells them apart. place: where files are dropped.
function render({ model, el, place = el }) {
  const root = element("div", { class: "flow-explorer", id: `flow-explorer-${Math.random().toString(36).slice(2)}` });
  el.append(root);
  root.explorer = new Explorer(model.get("config"), root, place);
}

export default { render };
