// The canvas: strokes by pointer events, so that mouse, pen and finger are one; files by drop or choice.
// Gradio gives element, trigger, upload and watch.
const canvas = element.querySelector('#canvas');
const file = element.querySelector('#file');
const context = canvas.getContext('2d');
const MAX_BYTES = 64 * 1024 * 1024;
const EVERY = 120; // milliseconds between two looks at an unfinished stroke
let pen = null; // the pointer that draws; a second finger or the palm would drag the line to and fro
let last;
let timer = null;

function clear() {
  context.fillStyle = 'black';
  context.fillRect(0, 0, canvas.width, canvas.height);
}

function send() {
  clearTimeout(timer);
  timer = null;
  trigger('drawn', {picture: canvas.toDataURL('image/png')});
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width,
          (event.clientY - box.top) * canvas.height / box.height];
}

function stroke(event) {
  const next = place(event);
  context.strokeStyle = 'white';
  context.lineWidth = 22;
  context.lineCap = context.lineJoin = 'round';
  context.beginPath();
  context.moveTo(...last);
  context.lineTo(...next);
  context.stroke();
  last = next;
  timer ??= setTimeout(send, EVERY);
}

canvas.addEventListener('pointerdown', event => {
  if (pen !== null || event.button) return;
  canvas.setPointerCapture(event.pointerId);
  pen = event.pointerId;
  last = place(event);
  stroke(event);
  event.preventDefault();
});
canvas.addEventListener('pointermove', event => {
  if (event.pointerId !== pen) return;
  for (const step of event.getCoalescedEvents?.().concat(event) ?? [event]) stroke(step);
});
for (const end of ['pointerup', 'pointercancel', 'lostpointercapture']) canvas.addEventListener(end, event => {
  if (event.pointerId !== pen) return;
  pen = null;
  send();
});

element.querySelector('#clear').addEventListener('click', () => { clear(); send(); });

async function take(chosen) {
  if (!chosen) return;
  if (chosen.size > MAX_BYTES) return trigger('dropped', {file: '', name: chosen.name});
  try {
    const {path} = await upload(chosen);
    trigger('dropped', {file: path, name: chosen.name});
  } catch (error) {
    trigger('dropped', {file: '', name: chosen.name});
  }
}
file.addEventListener('change', () => { take(file.files[0]); file.value = ''; });
for (const over of ['dragenter', 'dragover']) canvas.addEventListener(over, event => event.preventDefault());
canvas.addEventListener('drop', event => { event.preventDefault(); take(event.dataTransfer.files[0]); });

// A value from the server is "<number> <data URL>": an image to lay on the canvas.
watch('value', () => {
  const image = new Image();
  image.onload = () => {
    clear();
    context.imageSmoothingEnabled = false;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
  };
  image.src = String(props.value).split(' ')[1];
});

clear();
