// A button for one image file. Photos of today are larger than the messages that Jupyter accepts, so a small copy, whose short
// side has at most SIDE pixels, is sent as PNG; a file that this browser cannot read is sent unchanged, if it is small.

const SIDE = 1024, LARGEST = 8 * 2 ** 20;

// Whether this browser gives back what was drawn: with some settings for privacy, it gives noise.
function readsBack() {
  const context = document.createElement("canvas").getContext("2d"), known = context.createImageData(16, 16);
  known.data.forEach((_, i) => { known.data[i] = i % 4 === 3 ? 255 : 37 * i % 256; });
  context.putImageData(known, 0, 0);
  return context.getImageData(0, 0, 16, 16).data.every((v, i) => Math.abs(v - known.data[i]) <= 2);
}

async function read(file) {
  const isRead = readsBack(), bitmap = isRead && await createImageBitmap(file).catch(() => null);
  if (!bitmap) {
    if (file.size <= LARGEST) return { content: new DataView(await file.arrayBuffer()) };
    return { problem: isRead ? "is too large, and no image that this browser can read: choose a PNG, JPEG or WebP file"
      : "is too large for a browser that hands out noise instead of pixels, for privacy: choose a file of less than 8 MB" };
  }
  const scale = Math.min(1, SIDE / Math.min(bitmap.width, bitmap.height), 2 * SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return { content: new DataView(await blob.arrayBuffer()) };
}

function render({ model, el }) {
  const input = document.createElement("input");
  Object.assign(input, { type: "file", accept: "image/*", ariaLabel: "Own image" });
  let latest; // of several files, however long an earlier one takes
  input.addEventListener("change", async () => {
    const file = latest = input.files[0];
    input.value = ""; // so that the same file again is a change
    if (!file) return;
    const value = [{ name: file.name, ...await read(file) }];
    if (file !== latest) return;
    model.set("value", value);
    model.save_changes();
  });
  el.append(input);
}

export default { render };
