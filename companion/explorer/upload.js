// A button for one image file. Photos of today are larger than the messages that Jupyter accepts, so a small copy, whose short
// side has at most SIDE pixels, is sent as PNG; what this browser cannot read goes as it is, if it is small.

const SIDE = 1024, LARGEST = 8 * 2 ** 20;

async function read(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    if (file.size <= LARGEST) return { content: new DataView(await file.arrayBuffer()) };
    return { problem: "is too large, and no image that this browser can read: choose a PNG, JPEG or WebP file" };
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
  input.addEventListener("change", async () => {
    const [file] = input.files;
    if (!file) return;
    model.set("value", [{ name: file.name, ...await read(file) }]);
    model.save_changes();
    input.value = ""; // so that the same file again is a change
  });
  el.append(input);
}

export default { render };
