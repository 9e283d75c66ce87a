"""Synthetic faces, drawn from a seed: the images of a machine that has no data set.

Every face is painted back to front with soft masks, in the framing of aligned CelebA: coordinates run over
[-1, 1] (x right, y down), the eyes lie near y = 0.05 and the chin near y = 0.9. Arrays are (N, H, W), colours
(3, N, 1, 1), so that numpy's inner loops run along image rows."""

import numpy as np

NUM_RANDOM = 160  # uniforms per face, handed out in order by _Painter.between
CHUNK = 8  # faces drawn at a time: their arrays stay in the cache

# A style: ranges, probabilities, palettes. "ood", drawn like anime, has much bigger eyes, a much
# smaller nose, a pointed chin, vivid hair and flat shading.
# fmt: off
STYLES = {
    "natural": {
        "face_width": (0.5, 0.58), "jaw": (0.1, 0.4), "shading": (0.4, 0.9),
        "tilt": 0.12, "yaw": 0.16, "eye_x": (0.255, 0.3), "eye_y": (0.0, 0.06),
        "eye_width": (0.105, 0.14), "eye_aspect": (0.42, 0.66), "iris": (0.5, 0.62),
        "brow": (1.5, 0.016, 0.03), "nose": (0.85, 1.2), "mouth": (0.17, 0.25), "lips": 1.0, "drawn": 0.0,
        "male": 0.75, "fringe": 0.3, "jag": (0.0, 0.03), "sunglasses": 0.2, "grain": (0.004, 0.014),
        "skin": "f5d1b8 edc2a6 e3b391 d4a17d ba8763 996a4a 754d36 59382a",
        "hair": "120e0d 21160f 382417 59381f 80542e ad8047 d1ad6b 7a3319 8c8782 171315",
        "eyes": "331c0f 4d2e17 40618c 4d6640 616b73",
    },
    "ood": {
        "face_width": (0.58, 0.66), "jaw": (0.85, 1.1), "shading": (0.05, 0.15),
        "tilt": 0.2, "yaw": 0.12, "eye_x": (0.29, 0.33), "eye_y": (0.12, 0.2), "eye_width": (0.19, 0.235),
        "eye_aspect": (0.85, 1.25), "iris": (0.58, 0.7), "brow": (1.05, 0.01, 0.018), "nose": (0.25, 0.4),
        "mouth": (0.06, 0.13), "lips": 0.3, "drawn": 1.0, "male": 0.0, "fringe": 0.9, "jag": (0.06, 0.16),
        "sunglasses": 0.0, "grain": (0.003, 0.008),
        "skin": "ffe6d6 fcdec9 f7d4ba dbab8a",
        "hair": "f273a6 598cf2 4dcc99 fad959 a666e6 e64040 d9e0f2 333359 f29942 804d33",
        "eyes": "d9334d 3373e6 33b366 e69926 994dd9",
    },
}
# fmt: on
CLOTHES = "1f1f26 d9d9de 99262b 264080 336b52 73594d bf8ca6 595c66"
FRAMES = "141212 59331f 998c73 801a1f"
WHITE, BLACK = np.full((3, 1, 1, 1), 1.0, np.float32), np.full((3, 1, 1, 1), 0.05, np.float32)


def draw_faces(indices, style="natural", seed=0, size=64):
    """Draw the faces with these indices: uint8 (N, size, size, 3).

    A face depends only on (seed, style, index, size), not on the other faces drawn with it.
    Raises ValueError for an unknown style ("natural" and "ood" exist).
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: choose one of {', '.join(STYLES)}")
    indices = np.asarray(indices, dtype=np.int64)
    faces = np.empty((len(indices), size, size, 3), np.uint8)
    for start in range(0, len(indices), CHUNK):
        chunk = indices[start : start + CHUNK]
        uniforms = np.empty((len(chunk), NUM_RANDOM), np.float32)
        grain = np.empty((len(chunk), size, size), np.float32)
        for row, index in enumerate(chunk):
            bits = np.random.Philox(key=[seed, index], counter=[0, 0, 0, list(STYLES).index(style)])
            generator = np.random.Generator(bits)
            generator.random(out=uniforms[row], dtype=np.float32)
            generator.standard_normal(out=grain[row], dtype=np.float32)
        canvas = _Painter(uniforms, grain, style, size).paint()
        faces[start : start + CHUNK] = np.rint(np.clip(canvas, 0, 1) * 255).transpose(1, 2, 3, 0)
    return faces


def _bump(x, low, high):
    """Smooth step from 0 (x <= low) to 1 (x >= high)."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


class _Painter:
    """One chunk of faces: random numbers in, canvas (3, N, size, size) out."""

    def __init__(self, uniforms, grain, style, size):
        self.uniforms, self.grain, self.style, self.size = iter(uniforms.T), grain, STYLES[style], size
        axis = ((np.arange(size, dtype=np.float32) + 0.5) / size) * 2 - 1
        self.x, self.y = axis[None, None, :], axis[None, :, None]
        self.canvas = np.empty((3, len(uniforms), size, size), np.float32)

    # Random numbers: each (N, 1, 1), or (3, N, 1, 1) for a colour.
    def between(self, low, high):
        return low + (high - low) * next(self.uniforms)[:, None, None]

    def within(self, key):
        return self.between(*self.style[key])

    def chance(self, probability):
        return (next(self.uniforms) < probability).astype(np.float32)[:, None, None]

    def colour(self, palette, jitter=0.04):
        palette = np.array([list(bytes.fromhex(code)) for code in palette.split()], np.float32) / 255
        base = palette[(next(self.uniforms) * len(palette)).astype(int)].T[:, :, None, None]
        gain = 1 + 2 * self.between(-jitter, jitter)
        return base * gain + np.stack([self.between(-jitter, jitter) for _ in range(3)])

    # Masks and paint, in a window (rows, columns) of the canvas, as most features are small.
    def window(self, top=0.0, bottom=1.0, left=0.0, right=1.0):
        n = self.size
        self.area = np.s_[:, int(top * n) : int(np.ceil(bottom * n)), int(left * n) : int(np.ceil(right * n))]
        self.u, self.v = self.face_x[self.area], self.face_y[self.area]

    def ellipse(self, x, y, a, b, soft=1.0):
        """Coverage of an ellipse in face coordinates, with an edge of about `soft` pixels."""
        u, v = self.u - x, self.v - y
        u *= 1 / a
        v *= 1 / b
        u *= u
        v *= v
        u += v
        return self.cover((np.sqrt(u, out=u) - 1) * np.minimum(a, b), soft)

    def stroke(self, curve, x, half_length, half_width, soft=1.0):
        """Coverage of a line along v = curve(u) that thins out towards its ends."""
        along = np.clip(1 - np.square((self.u - x) / half_length), 0, 1)
        return self.cover(np.abs(self.v - curve) - half_width * np.sqrt(along), soft) * (along > 0)

    def cover(self, distance, soft=1.0):
        mask = distance * (-0.5 * self.size / soft)
        mask += 0.5
        return np.clip(mask, 0, 1, out=mask)

    def fill(self, mask, colour):
        rows = np.flatnonzero(mask.any(axis=(0, 2)))
        if len(rows):  # most features are small: leave the other rows alone
            rows = slice(rows[0], rows[-1] + 1)
            area = self.canvas[(slice(None), *self.area)][:, :, rows]
            change = (colour[:, :, rows] if colour.shape[2] > 1 else colour) - area
            change *= mask[:, rows]
            area += change

    def dab(self, colour, strength, x, y, a, b, soft=1.0):
        self.fill(self.ellipse(x, y, a, b, soft) * strength, colour)

    # The picture, back to front.
    def paint(self):
        self.pose()
        self.background()
        self.body()
        self.head()
        self.eyes()
        self.nose()
        self.mouth()
        self.front_hair()
        self.glasses()
        return self.finish()

    def pose(self):
        tilt = self.between(-self.style["tilt"], self.style["tilt"])
        scale = self.between(0.9, 1.1)
        dx, dy = self.between(-0.06, 0.06), self.between(-0.05, 0.07)
        x, y = (self.x - dx) / scale, (self.y - dy) / scale
        self.face_x = np.cos(tilt) * x + np.sin(tilt) * y
        self.face_y = np.cos(tilt) * y - np.sin(tilt) * x
        self.yaw = self.between(-self.style["yaw"], self.style["yaw"])
        self.light_x, self.light_y = self.between(-1, 1), self.between(-0.8, 0.1)
        self.a, self.b = self.within("face_width"), self.between(0.74, 0.83)
        self.jaw, self.shading = self.within("jaw"), self.within("shading")
        self.skin, self.hair = self.colour(self.style["skin"], 0.012), self.colour(self.style["hair"], 0.03)
        self.long = self.chance(0.5)
        self.male = (1 - self.long) * self.chance(self.style["male"])

    def background(self):
        self.window()
        near, far = self.between(0.1, 0.95), self.between(0.1, 0.9)
        tints = [np.stack([level + self.between(-0.18, 0.18) for _ in range(3)]) for level in (near, far)]
        angle = self.between(0, 2 * np.pi)
        ramp = 0.5 + 0.4 * (np.cos(angle) * self.x + np.sin(angle) * self.y)
        for _ in range(3):  # low-frequency texture
            fx, fy = self.between(0.5, 5), self.between(0.5, 5)
            wave = np.cos(fx * self.x + 2 * fx) * np.cos(fy * self.y + 3 * fy + angle)
            ramp = ramp + self.between(-0.25, 0.25) * wave
        self.canvas[:] = tints[0] + ramp * (tints[1] - tints[0])
        for _ in range(2):  # something out of focus behind the head
            x, y = self.between(-1, 1), self.between(-1, 0.6)
            blob = self.ellipse(x, y, self.between(0.1, 0.6), self.between(0.1, 0.9), soft=6)
            self.fill(blob * self.between(0, 0.6), tints[0] * self.between(0.4, 1.4))

    def body(self):
        """Hair behind the head, shoulders, neck."""
        self.volume = self.between(0.05, 0.2) * (0.5 + 0.5 * self.long) + 0.02
        self.wave, self.curl = self.between(0, 0.05), self.between(8, 18)
        ray = self.u / (np.abs(self.v + 0.95) + 0.55)  # strands run down from the crown
        strands = np.sin(ray * self.between(30, 50) + 4 * np.sin(ray * self.between(4, 9) + 3 * self.v))
        strands = strands + 0.7 * np.sin(ray * self.between(12, 22) + 2 * self.v)
        self.strands = 1 + self.between(0.03, 0.13) * strands - 0.15 * np.clip(self.v, 0, 1)
        edge = self.wave * np.sin(self.curl * self.v + 5 * self.volume)
        width = self.a + self.volume
        skull = self.ellipse(self.yaw * -0.3, -0.05, width, self.b * 0.86 + self.volume, soft=1.5)
        length = self.between(0.55, 1.5)
        fall = self.cover(np.abs(self.u + edge) - width * (1 + 0.1 * self.v), 1.5)
        fall = fall * self.cover(self.v - length, 6) * (self.v > -0.1) * self.long
        shown = 1 - self.male * self.chance(0.08)  # some heads are bald
        self.hair_shown = shown
        self.fill(np.maximum(skull * (0.3 + 0.7 * self.long), fall) * shown, self.hair * 0.62 * self.strands)
        self.window(top=0.55)
        cloth = self.colour(CLOTHES)
        shoulders = self.ellipse(self.yaw * -0.3, 1.55, self.between(0.95, 1.35), self.between(0.5, 0.7))
        shade = 0.85 + 0.3 * self.light_x * self.u
        neck_width = self.between(0.25, 0.33) * (1 + 0.2 * self.male) * (self.a / 0.54)
        from_neck = np.abs(self.u + 0.2 * self.yaw) - neck_width - 0.25 * np.clip(self.v - 0.95, 0, 1)
        self.fill(shoulders, cloth * shade)
        collar = self.ellipse(0, 0.9, neck_width * self.between(1.0, 1.5), self.between(0.2, 0.5), soft=1.5)
        under_chin = 0.92 - self.between(0.15, 0.35) * _bump(1.3 - self.v, 0.1, 0.5)
        neck = np.maximum(collar, self.cover(from_neck, 1.5) * self.cover(self.v - 1.05, 2)) * (self.v > 0.3)
        self.fill(neck, self.skin * under_chin * shade)

    def head(self):
        self.window(top=0.25, bottom=0.85)
        ear_x, ear_y = self.a * 0.98, self.between(0.08, 0.16)
        for side in (-1, 1):
            size = 0.09 * (1 - 2 * side * self.yaw)
            x = side * ear_x - self.yaw * 0.4
            self.dab(self.skin * 0.85, 1, x, ear_y, size, 0.16)
            self.dab(self.skin * 0.62, 1, x, ear_y, size * 0.5, 0.09, soft=2)
        self.window(0.02, 1.0, 0.02, 0.98)
        taper = np.maximum(self.v - 0.2, 0)  # straight towards a pointed chin, or round
        taper = taper if self.style["drawn"] else 1.4 * taper * taper
        u = self.u / (self.a * np.maximum(1 - self.jaw * taper, 0.05))
        v = (self.v - 0.1) / self.b
        radius2 = u * u + v * v
        self.head_mask = self.cover((np.sqrt(radius2) - 1) * self.a)
        depth = np.sqrt(np.clip(1 - 0.9 * radius2, 0.02, 1))  # the head as an ellipsoid, for its shading
        light = self.light_x * u + self.light_y * v * 0.8 + 0.75 * depth
        shade = 1 + self.shading * (light - 0.62) * 0.75
        warm = np.array([0.35, 0.0, -0.15], np.float32)[:, None, None, None] * (1 - shade) * 0.5
        self.shade = np.clip(shade, 0.3, 1.25)
        self.fill(self.head_mask, self.skin * (self.shade + warm))
        # Beard: the lower face, with an opening around the mouth.
        beard = self.male * self.chance(0.4)
        stubble = self.between(0.15, 0.85)
        line = self.between(0.3, 0.6) - self.between(0.0, 0.9) * np.square(self.u)
        area = self.head_mask * _bump(self.v - line, -0.06, 0.14)
        area = area * (1 - self.ellipse(self.yaw, 0.57, 0.2, 0.1, soft=4)) * self.strands[self.area]
        self.fill(area * beard * stubble, self.hair * 0.8)
        self.window(0.42, 0.92, 0.1, 0.9)
        moustache = self.stroke(0.47 + 0.5 * np.square(self.u - self.yaw), self.yaw, 0.24, 0.05, 2)
        self.fill(moustache * self.male * np.maximum(beard, self.chance(0.15)) * stubble, self.hair * 0.75)
        blush = self.between(0, 0.35) * (1 - 0.6 * self.male)
        rose = self.skin * np.array([1.05, 0.72, 0.7], np.float32)[:, None, None, None]
        for side in (-1, 1):
            self.dab(rose, blush, side * 0.33 + self.yaw * 0.6, 0.37, 0.17, 0.13, soft=9)

    def eyes(self):
        self.eye_x, self.eye_y = self.within("eye_x"), self.within("eye_y")
        self.eye_w = self.within("eye_width")
        self.eye_h, self.iris = self.eye_w * self.within("eye_aspect"), self.eye_w * self.within("iris")
        self.iris_colour = self.colour(self.style["eyes"], 0.05)
        self.gaze, self.slant = self.between(-0.3, 0.3), self.between(-0.15, 0.22)
        self.lid, self.lash = self.between(0.05, 0.35), self.between(0.3, 0.9) * (1 - 0.5 * self.male)
        self.makeup = np.stack([self.between(-0.15, 0.05) for _ in range(3)]) * (1 - self.male)
        self.brow_y, self.brow_bend = self.between(0.13, 0.19), self.between(0.2, 1.3)
        length, thin, thick = self.style["brow"]
        self.brow_tilt, self.brow_length = self.between(-0.5, 0.15), length * self.eye_w
        self.brow_w = self.between(thin, thick) * (1 + 0.5 * self.male)
        self.socket = self.between(0.15, 0.5) * self.shading
        for side in (-1, 1):
            self.eye(side)

    def eye(self, side):
        self.window(0.24, 0.8, 0.08 if side < 0 else 0.36, 0.64 if side < 0 else 0.92)
        x = side * self.eye_x * (1 - 0.7 * side * self.yaw) + self.yaw * 0.8
        y, w, h = self.eye_y - 0.04 * self.slant, self.eye_w * (1 + 0.6 * side * self.yaw), self.eye_h
        self.dab(self.skin * 0.5 + self.makeup, self.socket, x, y - 0.03, w * 1.45, h + 0.085, soft=8)
        self.v = self.v + self.slant * side * (self.u - x)  # the outer corner higher or lower
        white = self.ellipse(x, y, w, h) * self.cover(y - h * (1 - self.lid) - self.v)
        self.fill(white, WHITE * (0.92 - 0.12 * self.shading))
        x_iris, wide = x + self.gaze * w * 0.5, self.iris
        tall = np.maximum(wide, h * 0.8 * self.style["drawn"])
        self.dab(self.iris_colour * 0.55, white, x_iris, y, wide, tall)
        self.dab(self.iris_colour * 1.15, white, x_iris, y + 0.2 * tall, wide * 0.75, tall * 0.7, soft=2)
        self.dab(BLACK, white, x_iris, y, wide * 0.48, tall * 0.5)
        x_glint = x_iris + np.sign(self.light_x) * 0.45 * wide
        self.dab(WHITE, white * 0.95, x_glint, y - 0.45 * tall, 0.32 * wide, 0.3 * tall)
        arc = y - h * (1 - self.lid) * np.clip(1 - np.square((self.u - x) / (w * 1.12)), 0, 1)
        thick = 0.014 + 0.02 * self.lash + 0.01 * self.style["drawn"]
        self.fill(self.stroke(arc, x, w * 1.15, thick) * (0.55 + 0.45 * self.lash), self.hair * 0.15 + 0.04)
        self.fill(self.stroke(arc - 0.06, x, w * 1.1, 0.016, soft=2) * self.shading * 0.6, self.skin * 0.55)
        under = y + h * np.clip(1 - np.square((self.u - x) / w), 0, 1)
        self.fill(self.stroke(under + 0.012, x, w, 0.012, soft=1.5) * 0.45, self.skin * 0.55)
        out = side * (self.u - x) / self.eye_w  # grows away from the nose
        bend = 0.05 * (self.brow_bend * np.square(out - 0.3) - self.brow_tilt * out)
        brow = self.stroke(y - h - self.brow_y + bend, x + 0.02 * side, self.brow_length, self.brow_w, 1.5)
        self.fill(brow * 0.85, self.hair * 0.6)

    def nose(self):
        self.window(0.4, 0.86, 0.2, 0.8)
        n, x = self.within("nose"), self.yaw * 1.5
        tip = self.between(0.34, 0.4) + (1 - n) * 0.02
        width, depth = self.between(0.09, 0.135) * n, self.shading * 0.55
        side = -np.sign(self.light_x)
        away, below = x * 0.85 + side * width * 0.75, tip + 0.062 * n
        self.dab(
            self.skin * 0.62, depth, away, tip - 0.2 * n, width * 0.45, 0.24 * n, soft=5
        )  # side in shadow
        self.dab(
            self.skin * 1.25, depth * 0.6, x * 0.9, tip - 0.16 * n, width * 0.28, 0.22 * n, soft=3
        )  # bridge
        self.dab(self.skin * 0.55, 0.15 + depth, x, below, width * 1.2, 0.05 * n, soft=4)
        for s in (-1, 1):
            wing, nostril = x + s * width * 0.95, x + s * width * 0.5
            self.dab(
                self.skin * 0.68, 0.1 + 0.5 * depth, wing, tip + 0.025 * n, width * 0.3, 0.055 * n, soft=2
            )
            self.dab(self.skin * 0.28, 0.75, nostril, below, width * 0.3, 0.025 * n, soft=1.2)
        self.dab(self.skin * 1.35, depth * 0.9, x - side * 0.02, tip, width * 0.38, 0.045 * n, soft=3)

    def mouth(self):
        self.window(0.58, 1.0, 0.2, 0.8)
        x, y = self.yaw * 1.1, self.between(0.56, 0.63) + 0.03 * self.style["drawn"]
        w, smile = self.within("mouth"), self.between(-0.25, 1.0)
        opening = np.clip(self.between(-0.06, 0.09), 0, 1) * (0.4 + 0.6 * np.clip(smile, 0, 1))
        w = w * (1 + 0.2 * smile)
        full = self.style["lips"]
        upper, lower = full * self.between(0.02, 0.045), full * self.between(0.035, 0.065)
        tint = np.stack([self.between(0.78, 1.0), self.between(0.4, 0.68), self.between(0.45, 0.7)])
        lipstick = np.stack([self.between(0.0, 0.1), self.between(-0.25, -0.1), self.between(-0.15, 0.0)])
        lips = self.skin * tint + self.chance(0.35) * (1 - self.male) * lipstick
        t = (self.u - x) / w
        bow = np.clip(1 - t * t, 0, 1)
        corner = y - 0.085 * smile * t * t + 0.03 * smile
        body = np.sqrt(bow)
        top = corner - upper * body - opening * 0.3 * bow + 0.012 * np.exp(-30 * t * t)
        bottom = corner + lower * bow + opening * 1.1 * bow
        inside = (np.abs(t) < 1.02).astype(np.float32)
        self.fill(self.cover(np.maximum(top - self.v, self.v - bottom), 1.3) * inside, lips * 0.95)
        gap_top, gap_bottom = corner - opening * 0.3 * bow, corner + opening * bow + 0.004
        gap = self.cover(np.maximum(gap_top - 0.006 - self.v, self.v - gap_bottom - 0.006), 1.3) * inside
        self.fill(gap * 0.8, lips * 0.3)
        teeth = self.cover(np.maximum(gap_top - self.v, self.v - gap_bottom + 0.25 * opening))
        self.fill(teeth * (np.abs(t) < 0.86) * (opening > 0.015) * 0.95, WHITE * 0.9)
        below = y + lower + opening
        self.dab(self.skin * 0.6, self.shading * 0.4, x, below + 0.085, w * 0.5, 0.03, soft=4)
        self.dab(lips * 1.35, self.shading * 0.5, x, below - 0.45 * lower, w * 0.35, 0.015, soft=2)

    def front_hair(self):
        """The skull minus an opening for the face, whose upper edge is the hairline or a fringe."""
        self.window()
        width, part = self.a + self.volume * 0.75, self.between(-0.35, 0.35)
        edge = self.wave * np.sin(self.curl * self.v + 5 * self.volume)
        tuft = self.between(0, 0.05) * np.sin(self.u * self.between(5, 16) + 9 * part)
        top, height = tuft - 0.02 - 0.3 * self.volume, self.b * 0.84 + self.volume
        skull = self.ellipse(self.yaw * -0.2 + edge, top, width, height, soft=1.5)
        fringe = self.chance(self.style["fringe"])
        slope = self.between(-0.25, 0.55) * (1 - 0.5 * fringe)
        line = -self.between(0.38, 0.56) + fringe * self.between(0.1, 0.26) + slope * np.abs(self.u - part)
        line = line + (1 - fringe) * self.between(0.1, 1.3) * np.square(self.u)
        line = line + self.within("jag") * np.abs(np.sin(self.u * self.between(6, 14) + 9 * part))
        cheek = self.a * (self.between(0.86, 0.99) * self.long + self.between(1.0, 1.08) * (1 - self.long))
        across = np.abs(self.u - self.yaw * 0.3 + edge) - cheek - 0.1 * np.clip(self.v, 0, 1)
        # Distance to the opening: above the hairline, or beside the cheeks; its upper corners are round.
        corner = np.maximum(line - self.v, 0) + np.maximum(across + 0.16, 0)
        opening = np.maximum(np.maximum(line - self.v, across), corner - 0.16)
        sideburn = self.between(-0.05, 0.3)
        falls = self.cover(self.v - sideburn, 4) * (1 - self.long) + self.long
        drape = self.cover(np.abs(self.u + edge) - width, 1.5) * (self.v > -0.05) * self.long
        drape = drape * self.cover(self.v - self.between(0.5, 1.6), 6)
        shape = np.maximum(skull * falls, drape)
        shadow = shape * self.cover(-(opening + 0.03), 3) * self.hair_shown
        self.fill(shadow * 0.35 * (self.v < 0.4), self.skin * 0.4)
        mask = shape * self.cover(-opening, 1.3) * self.hair_shown
        gloss = np.exp(-np.square((self.v + 0.5 - 0.4 * np.square(self.u)) / self.between(0.06, 0.16)))
        lit = 1 + 0.35 * self.light_x * self.u
        self.fill(mask, self.hair * self.strands * lit * (1 + gloss * self.between(0.05, 0.5)) + 0.05 * gloss)

    def glasses(self):
        self.window(0.28, 0.8, 0.05, 0.95)
        worn, dark = self.chance(0.13), self.chance(self.style["sunglasses"])
        radius = np.minimum(self.eye_w * self.between(1.4, 1.85), 0.9 * self.eye_x)
        squeeze, frame = self.between(0.7, 1.0), self.colour(FRAMES)
        y, rim = self.eye_y + 0.02, self.between(0.012, 0.03)
        for side in (-1, 1):
            x = side * self.eye_x * (1 - 0.7 * side * self.yaw) + self.yaw * 0.8
            outer = self.ellipse(x, y, radius + rim, radius * squeeze + rim)
            inner = self.ellipse(x, y, radius - rim, radius * squeeze - rim)
            self.fill(inner * worn * (0.06 + 0.84 * dark), WHITE * 0.75 * (1 - dark) + frame * 0.6 * dark)
            self.fill(np.clip(outer - inner, 0, 1) * worn, frame)
        between = np.abs(self.u - self.yaw) - self.eye_x + radius
        self.fill(self.cover(np.maximum(between, np.abs(self.v - y + 0.03) - rim), 1) * worn, frame)

    def finish(self):
        """Exposure, a soft lens, and grain, so that the images are not trivially smooth."""
        image = self.canvas
        falloff = self.light_x * self.x + self.light_y * self.y
        image *= self.between(0.85, 1.1) + self.between(0, 0.15) * falloff
        blur, noise = self.between(0.0, 0.2), self.grain + 0.0
        image[:, :, 1:-1] += blur * (image[:, :, :-2] + image[:, :, 2:] - 2 * image[:, :, 1:-1])
        image[..., 1:-1] += blur * (image[..., :-2] + image[..., 2:] - 2 * image[..., 1:-1])
        noise[:, 1:, 1:] += 0.5 * (
            self.grain[:, :-1, 1:] + self.grain[:, 1:, :-1]
        )  # neighbours share some of it
        image += np.stack([self.between(-0.035, 0.035) for _ in range(3)]) + self.within("grain") * noise
        return image
