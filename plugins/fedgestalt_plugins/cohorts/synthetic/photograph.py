"""The conditions of an everyday photograph: pose, expression, light, and the camera's faults."""

from __future__ import annotations

import cv2
import numpy as np

from fedgestalt.contracts import FACE_SIZE, Pixels
from fedgestalt_plugins.cohorts.synthetic.head import Floats
from fedgestalt_plugins.cohorts.synthetic.render import View


def draw_view(rng: np.random.Generator, amount: float) -> tuple[dict[str, float], View]:
    """Draw facial expression (weights of morph targets) and view; ``amount`` scales both."""
    raised = (rng.random() < 0.25) * rng.uniform(0, 0.7) * amount
    closing = max(0.0, rng.normal(0, 0.12)) * amount
    ageing = (rng.random() < 0.3) * rng.normal(0, 0.35)
    expression = {
        "x-mouth-corner-puller": max(0.0, rng.normal(0.05, 0.35)) * amount * 0.8,
        "x-mouth-compression": max(0.0, rng.normal(-0.1, 0.2)) * amount,
        "head-age-incr" if ageing > 0 else "head-age-decr": abs(ageing),
    }
    for side in ("left", "right"):
        expression |= {f"x-eyebrows-{side}-up": raised, f"x-eye-{side}-closure": closing}
    backdrop = rng.uniform(30, 215) + rng.normal(0, 10, 3)
    backdrop = backdrop + rng.normal(0, 14, (4, 4, 1)) + rng.normal(0, 5, (4, 4, 3))
    view = View(
        yaw=rng.normal(0, 0.17) * amount,
        pitch=rng.normal(0, 0.09) * amount,
        roll=rng.normal(0, 0.05) * amount,
        light=(rng.normal(0, 0.6) * amount, rng.normal(0.35, 0.35), 1.0),
        ambient=rng.uniform(0.35, 0.62),
        specular=rng.uniform(0.03, 0.2),
        gaze=(rng.normal(0, 0.5) * amount, rng.normal(0, 0.5) * amount),
        landmark_jitter=rng.normal(0, 0.012 * amount, (2, 5)).T @ [1, 1j],
        backdrop=np.clip(backdrop, 0, 255).astype(np.float32),
    )
    return {name: weight for name, weight in expression.items() if weight}, view


def degrade(image: Floats, rng: np.random.Generator, amount: float) -> Pixels:
    """White balance, exposure, blur, noise, now and then grey, and JPEG.

    Args:
        image: RGB, float32 (112, 112, 3), about 0..255.
        rng: what is random.
        amount: scale of the faults.
    """
    gains = (1 + rng.normal(0, 0.035, 3) * amount) * rng.uniform(0.78, 1.04) / 255
    image = np.clip(image * gains.astype(np.float32), 0, 1)
    image = cv2.pow(image, rng.uniform(0.8, 1.25)) * np.float32(255)
    if rng.random() < 0.35 * amount:
        side = round(FACE_SIZE * rng.uniform(0.35, 0.8))
        image = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        image = cv2.resize(image, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.3 * amount:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.1))
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image = image + noise * np.float32(rng.uniform(1, 6) * amount)
    pixels: Pixels = np.clip(image, 0, 255).astype(np.uint8)[..., ::-1]  # OpenCV codes BGR
    if rng.random() < 0.08:
        grey = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
        pixels = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(45, 95))]
    encoded = cv2.imencode(".jpg", np.ascontiguousarray(pixels), quality)[1]
    decoded = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))
    return np.ascontiguousarray(decoded[..., ::-1])
