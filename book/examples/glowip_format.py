"""A flow in the format of GlowIP's files: what stands in book/use.md for a file of theirs."""


def in_glowip_format(glow):
    """The state dict that GlowIP would write of this flow: one list of modules, squeeze, steps, split."""
    theirs, position = {}, 0
    for number, level in enumerate(glow.levels):
        position += 1  # the squeeze
        for step in range(len(level)):
            prefix = f"levels.{number}.{step}."
            for key, value in glow.state_dict().items():
                if not key.startswith(prefix) or key.endswith("initialized"):
                    continue
                name = key.removeprefix(prefix).replace("log_scale", "logs")
                if "actnorm" in name:
                    name, value = name.replace("bias", "b"), value.view(1, -1, 1, 1)
                elif name == "invconv.weight":
                    name, value = "invconv.W", value[:, :, None, None]
                elif name.endswith("logs"):
                    value = value.view(-1, 1, 1)
                theirs[f"glow_modules.{position}.{name}"] = value
            position += 1
        position += 1  # the split
    return theirs
