"""A network that finds one to three digits on a canvas: for each of 8 x 8 cells, whether, which, and a box."""

import torch
from digits import split
from program import Program, Task, adams
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate, l1_loss

STEPS, BATCH, SIDE, CELL, MOST = 400, 16, 64, 8, 3


def canvases(images, classes, count, generator):
    """Return canvases [n, 1, SIDE, SIDE], and of their digits [n, MOST] classes, -1 for none, and boxes [n, MOST, 4].

    A box has its middle and its sizes, in pixels. Each digit has a place in one of four quarters, and another size.
    """
    canvas, boxes = torch.zeros(count, 1, SIDE, SIDE), torch.zeros(count, MOST, 4)
    found = torch.full((count, MOST), -1)
    for each in range(count):
        quarters = torch.randperm(4, generator=generator)
        for place in range(int(torch.randint(MOST, (), generator=generator)) + 1):
            which = int(torch.randint(len(images), (), generator=generator))
            size = int(torch.randint(16, 29, (), generator=generator))
            corner = torch.randint(SIDE // 2 - size + 1, (2,), generator=generator)
            top, left = (corner + SIDE // 2 * torch.stack([quarters[place] // 2, quarters[place] % 2])).tolist()
            digit = interpolate(images[which].view(1, 1, 28, 28), (size, size), mode="bilinear")[0]
            canvas[each, :, top : top + size, left : left + size] = digit
            ink = (digit[0] > 0.3).nonzero()
            (up, before), (down, after) = ink.amin(0).tolist(), (ink.amax(0) + 1).tolist()
            boxes[each, place] = torch.tensor(
                [top + (up + down) / 2, left + (before + after) / 2, down - up, after - before],
            )
            found[each, place] = classes[which]
    return canvas, found, boxes


def overlap(a, b):
    """Return the intersection over union of boxes [..., 4]."""
    low = torch.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = torch.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    common = (high - low).clamp(min=0).prod(-1)
    return common / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - common)


def layer(inputs, outputs, stride):
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()]


def make(seed):
    (x, y), (held_x, held_y) = split()
    canvas, classes, boxes = canvases(x, y, 1500, torch.Generator().manual_seed(0))
    held, held_classes, held_boxes = canvases(held_x, held_y, 200, torch.Generator().manual_seed(1))
    model, generator = (
        nn.Sequential(
            *(*layer(1, 16, 2), *layer(16, 32, 2), *layer(32, 64, 2), *layer(64, 64, 1), *layer(64, 64, 1)),
            nn.Conv2d(64, 15, 1),
        ),
        torch.Generator().manual_seed(seed),
    )

    def cells(classes, boxes):
        """Return of all digits their canvas, the row and column of the cell of their middle, class and box."""
        number, place = (classes >= 0).nonzero(as_tuple=True)
        box = boxes[number, place]
        row, column = (box[:, :2] / CELL).long().unbind(1)
        return number, row, column, classes[number, place], box

    def box_of(said, row, column):
        """Return boxes in pixels: the middle within the cell, and the sizes."""
        corner = torch.stack([row, column], 1) * CELL
        return torch.cat([corner + CELL * said[:, :2].sigmoid(), 28 * said[:, 2:4].sigmoid()], 1)

    def loss(_):
        drawn = torch.randint(len(canvas), (BATCH,), generator=generator)
        said = model(canvas[drawn]).permute(0, 2, 3, 1)
        number, row, column, kind, box = cells(classes[drawn], boxes[drawn])
        there = torch.zeros(said.shape[:3])
        there[number, row, column] = 1
        at = said[number, row, column]
        present = binary_cross_entropy_with_logits(said[..., 4], there, pos_weight=torch.tensor(10.0))
        return present + l1_loss(box_of(at, row, column), box) / CELL + cross_entropy(at[:, 5:], kind)

    def error():
        said = model(held).permute(0, 2, 3, 1)
        number, row, column, kind, box = cells(held_classes, held_boxes)
        at = said[number, row, column]
        right = (at[:, 4] > 0) & (at[:, 5:].argmax(1) == kind) & (overlap(box_of(at, row, column), box) > 0.5)
        return 1 - float(right.sum()) / float((said[..., 4] > 0).sum() + len(kind) - right.sum())

    return Task(model, loss, error)


def own(model):
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.937, nesterov=True, weight_decay=5e-4)


PROGRAM = Program(
    "a detector of digits on a canvas",
    "Ultralytics' YOLOv5: SGD, lr 0.01, momentum 0.937, L2 penalty 5e-4",
    STEPS,
    make,
    own,
    adams(STEPS, 1e-3, 3e-3, 1e-2, weight_decay=0.05),
    "1 - share of right detections among all digits and detections",
)
