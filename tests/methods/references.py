"""The authors' reference implementations of DINO, iBOT and DINOv2 in plain float64."""

import math

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn

from lightning_contrast.nn import ibot_masks
from tests.plain_transformer import AdamW, plain_head, plain_tokens

VIT = {"patch": 4, "heads": 2}


class TeacherReference:
    """The training loop of DINO and iBOT in plain float64; a subclass has the ``loss``."""

    clip: float
    """Largest norm of each gradient on its own."""

    def __init__(self, module, total, warmup, lr, centers):
        nets = module.backbone, module.projector
        self.weights = [{k: v.detach().clone() for k, v in net.named_parameters()} for net in nets]
        self.teacher = [{k: v.clone() for k, v in part.items()} for part in self.weights]
        self.centers = [torch.zeros(12, dtype=torch.float64) for _ in range(centers)]
        self.total, self.warmup, self.lr = total, warmup, lr
        self.adamw, self.losses = AdamW(), []

    def step(self, number, epoch, micro_batches):
        """Take a step on micro-batches, each the arguments of ``loss``, which returns it and the teacher's means."""
        for part in self.weights:
            for key in part:
                part[key] = part[key].detach().requires_grad_("weight_g" not in key)
        results = [self.loss(*arguments) for arguments in micro_batches]
        self.losses += [loss.item() for loss, _ in results]
        weights = {(i, key): value for i, part in enumerate(self.weights) for key, value in part.items()}
        trained = [name for name, value in weights.items() if value.requires_grad]
        loss = sum(loss for loss, _ in results) / len(results)
        found = dict(zip(trained, torch.autograd.grad(loss, [weights[name] for name in trained]), strict=True))
        gradients = {
            name: gradient * min(1.0, self.clip / (gradient.norm().item() + 1e-6))
            for name, gradient in found.items()
            if epoch >= 1 or "last_layer" not in name[1]
        }
        if number < self.warmup:
            lr = self.lr * number / (self.warmup - 1)
        else:
            progress = (number - self.warmup) / (self.total - self.warmup)
            lr = 1e-6 + 0.5 * (self.lr - 1e-6) * (1 + math.cos(math.pi * progress))
        decay = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * number / self.total))
        decays = {name: decay if value.ndim > 1 else 0 for name, value in weights.items()}
        plain = {name: value.detach() for name, value in weights.items()}
        for (i, key), value in self.adamw.step(plain, gradients, lr, decays).items():
            self.weights[i][key] = value
        momentum = 1 - (1 - 0.996) * (1 + math.cos(math.pi * number / self.total)) / 2
        for old, new in zip(self.teacher, self.weights, strict=True):
            for key in old:
                old[key] = momentum * old[key] + (1 - momentum) * new[key].detach()
        for i in range(len(self.centers)):  # kept in float32
            mean = sum(means[i] for _, means in results) / len(results)
            self.centers[i] = (0.9 * self.centers[i] + 0.1 * mean).float().double()


class DINOReference(TeacherReference):
    """DINO's: no code of the package beside the networks' forward passes."""

    clip = 0.01

    def __init__(self, module, total, warmup, lr):
        super().__init__(module, total, warmup, lr, centers=1)
        self.nets = module.backbone, module.projector

    def run(self, weights, view):
        hidden = torch.func.functional_call(self.nets[0], weights[0], (view,))
        return torch.func.functional_call(self.nets[1], weights[1], (hidden,))

    def loss(self, views, temperature):
        student = [self.run(self.weights, view) for view in views]
        teacher = [self.run(self.teacher, view).detach() for view in views[:2]]
        terms = []
        for t in range(2):
            q = F.softmax((teacher[t] - self.centers[0]) / temperature, dim=-1)
            for s in range(len(views)):
                if s != t:
                    terms.append(torch.sum(-q * F.log_softmax(student[s] / 0.1, dim=-1), dim=-1).mean())
        return sum(terms) / len(terms), [torch.cat(teacher).mean(0)]


class IBOTReference(TeacherReference):
    """iBOT's: no module and no loss of the package."""

    clip = 0.02

    def __init__(self, module, total, warmup, lr, layer):
        super().__init__(module, total, warmup, lr, centers=2)
        self.layer = layer

    def run(self, weights, view, mask=None):
        tokens = plain_tokens(weights[0], view, mask=mask, **VIT)
        return plain_head(weights[1], tokens[:, 0]), plain_head(weights[1], tokens[:, 1:], self.layer)

    def loss(self, views, temperatures, seed):
        torch.manual_seed(seed)
        masks = ibot_masks(2 * len(views[0]), (4, 4)).split(len(views[0]))
        assert any(mask.any() for mask in masks)
        student = [self.run(self.weights, view, mask) for view, mask in zip(views[:2], masks, strict=True)]
        student += [self.run(self.weights, view) for view in views[2:]]
        teacher = [[out.detach() for out in self.run(self.teacher, view)] for view in views[:2]]
        total_class, total_patch, n_class, n_patch = 0, 0, 0, 0
        for q in range(2):
            class_target = F.softmax((teacher[q][0] - self.centers[0]) / temperatures[0], dim=-1)
            patch_target = F.softmax((teacher[q][1] - self.centers[1]) / temperatures[1], dim=-1)
            for v in range(len(views)):
                if v == q:
                    each = torch.sum(-patch_target * F.log_softmax(student[v][1] / 0.1, dim=-1), dim=-1)
                    mask = masks[v].double()
                    each = torch.sum(each * mask, dim=-1) / mask.sum(dim=-1).clamp(min=1.0)
                    total_patch, n_patch = total_patch + each.mean(), n_patch + 1
                else:
                    each = torch.sum(-class_target * F.log_softmax(student[v][0] / 0.1, dim=-1), dim=-1)
                    total_class, n_class = total_class + each.mean(), n_class + 1
        means = [torch.cat([out[i].flatten(0, -2) for out in teacher]).mean(0) for i in range(2)]
        return total_class / n_class + total_patch / n_patch, means


class Moves(L.Callback):
    """Counts for each watched tensor at how many batches' ends it had moved."""

    def __init__(self, watched):
        self.watched = watched

    def now(self, module):
        return [tensor.detach().clone() for tensor in self.watched(module)]

    def on_train_start(self, trainer, pl_module):
        self.last = self.now(pl_module)
        self.counts = [0] * len(self.last)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        now = self.now(pl_module)
        self.counts = [n + (not torch.equal(a, b)) for n, a, b in zip(self.counts, self.last, now, strict=True)]
        self.last = now

    def on_train_end(self, trainer, pl_module):
        self.on_train_batch_start(trainer, pl_module, None, 0)


def program_sinkhorn(logits, temperature):
    q = torch.exp(logits / temperature).t()
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True)
        q /= len(q)
        q /= q.sum(dim=0, keepdim=True)
        q /= q.shape[1]
    return (q * q.shape[1]).t()


def program_koleo(x):
    x = F.normalize(x, eps=1e-8, p=2, dim=-1)
    dots = torch.mm(x, x.t())
    dots.view(-1)[:: len(x) + 1].fill_(-1)
    _, nearest = torch.max(dots, dim=1)
    return -torch.log(nn.PairwiseDistance(2, eps=1e-8)(x, x[nearest]) + 1e-8).mean()


def dinov2_loss(module, views, masks, centering, temperature, centers=(0, 0)):
    """Return DINOv2's sum of four terms, with its own scales; ``masks`` are those of one view after the other."""
    size, local = len(views[0]), len(views) - 2
    student = dict(module.backbone.named_parameters())
    teacher = dict(module.momentum_backbone.named_parameters())
    heads = [dict(head.named_parameters()) for head in (module.projector, module.momentum_projector)]
    own = [module.patch_projector or module.projector, module.momentum_patch_projector or module.momentum_projector]
    patch_heads = [dict(head.named_parameters()) for head in own]
    seen = plain_tokens(student, torch.cat(views[:2]), mask=masks, **VIT)
    known = plain_tokens(teacher, torch.cat(views[:2]), **VIT).detach()
    swapped = torch.cat([known[size:, 0], known[:size, 0]])  # A of the student meets B of the teacher
    logits, patches = plain_head(heads[1], swapped).detach(), plain_head(patch_heads[1], known[:, 1:][masks]).detach()
    if centering == "sinkhorn":
        targets, patch_targets = program_sinkhorn(logits, temperature), program_sinkhorn(patches, temperature)
    else:
        targets = F.softmax((logits - centers[0]) / temperature, dim=-1)
        patch_targets = F.softmax((patches - centers[1]) / temperature, dim=-1)

    def cross_entropy(outputs, goals):
        total = 0
        for out in outputs:
            for goal in goals:
                total -= (goal * F.log_softmax(out / 0.1, dim=-1)).sum(-1).mean()
        return total

    terms = 2 + 2 * local
    loss = 0
    if local:
        outputs = [plain_head(heads[0], plain_tokens(student, view, **VIT)[:, 0]) for view in views[2:]]
        loss += cross_entropy(outputs, targets.split(size)) / terms
    loss += cross_entropy([plain_head(heads[0], seen[:, 0])], [targets]) * 2 / terms
    loss += 0.1 * sum(program_koleo(view) for view in seen[:, 0].split(size))
    weights = (1 / masks.double().sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
    each = (patch_targets * F.log_softmax(plain_head(patch_heads[0], seen[:, 1:][masks]) / 0.1, dim=-1)).sum(-1)
    return loss - (each * weights).sum() / len(masks) * 2 * 0.5
