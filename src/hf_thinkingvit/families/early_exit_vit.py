"""Vision transformers with exits by layer: their record. Nobody has released checkpoints of these methods for ViTs."""

from ..models import weights_from_vit
from ..models.configuration_early_exit_vit import EarlyExitViTConfig
from ..models.modeling_early_exit_vit import EarlyExitViTForImageClassification, EarlyExitViTModel
from . import costs_vit
from .record import (
    EXIT_FIELDS,
    IMAGE_CLASSIFICATION,
    TRAINING_FIELDS,
    CardText,
    Costs,
    Family,
    Paper,
    PlainSource,
)
from .thinkingvit import STAGED_LIMITS


FAMILY = Family(
    name="Early-exit ViT",
    config_class=EarlyExitViTConfig,
    model_class=EarlyExitViTModel,
    heads={IMAGE_CLASSIFICATION: EarlyExitViTForImageClassification},
    costs=Costs(stages=costs_vit.exit_macs, published_stages=costs_vit.published_exit_macs),
    plain=PlainSource("from_vit", frozenset({*weights_from_vit.FIXED_FIELDS, *weights_from_vit.SHARED_FIELDS})),
    free_fields=TRAINING_FIELDS | EXIT_FIELDS | {"halting_loss_weight", "halting_prior", "self_distillation"},
    announced_fields=frozenset(),
    card=CardText(
        description="""\
A Vision Transformer with early exits by layer: images whose answer after some of the layers is certain enough leave,
and only the others go on through the next layers. It has one width, and nothing of the tokens is computed twice.""",
        limits=STAGED_LIMITS,
    ),
    paper=Paper(
        title="early exits by layer (BranchyNet, ViT-EE, FastBERT, PABEE, ACT, PonderNet)",
        bibtex="""\
@inproceedings{teerapittayanon2016branchynet,
  title     = {BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks},
  author    = {Teerapittayanon, Surat and McDanel, Bradley and Kung, H. T.},
  booktitle = {International Conference on Pattern Recognition (ICPR)},
  year      = {2016}
}
@article{bakhtiarnia2021singlelayer,
  title   = {Single-Layer Vision Transformers for More Accurate Early Exits with Less Overhead},
  author  = {Bakhtiarnia, Arian and Zhang, Qi and Iosifidis, Alexandros},
  journal = {arXiv preprint arXiv:2105.09121},
  year    = {2021}
}
@inproceedings{liu2020fastbert,
  title     = {FastBERT: a Self-distilling BERT with Adaptive Inference Time},
  author    = {Liu, Weijie and Zhou, Peng and Wang, Zhiruo and Zhao, Zhe and Deng, Haotang and Ju, Qi},
  booktitle = {Annual Meeting of the Association for Computational Linguistics (ACL)},
  year      = {2020}
}
@inproceedings{zhou2020pabee,
  title     = {BERT Loses Patience: Fast and Robust Inference with Early Exit},
  author    = {Zhou, Wangchunshu and Xu, Canwen and Ge, Tao and McAuley, Julian and Xu, Ke and Wei, Furu},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2020}
}
@article{graves2016act,
  title   = {Adaptive Computation Time for Recurrent Neural Networks},
  author  = {Graves, Alex},
  journal = {arXiv preprint arXiv:1603.08983},
  year    = {2016}
}
@article{banino2021pondernet,
  title   = {PonderNet: Learning to Ponder},
  author  = {Banino, Andrea and Balaguer, Jan and Blundell, Charles},
  journal = {arXiv preprint arXiv:2107.05407},
  year    = {2021}
}""",
    ),
)
