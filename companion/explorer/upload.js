// A button for one image file. Photos of today are larger than the messages that Jupyter accepts, so the middle square, of at
// most SIDE pixels, is sent as PNG; what this browser cannot read goes as it is, if it is small.

const SIDE = 1024, LARGEST = 8 * 2 ** 20;

async function read(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    if (file.size <= LARGEST) return { content: new DataView(await file.arrayBuffer()) };
    return { problem: "is too large, and no image that this browser can read: choose a PNG, JPEG or WebP file" };
  }
  const side = Math.min(bitmap.width, bitmap.height), size = Math.min(side, SIDE), canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, size, size);
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
