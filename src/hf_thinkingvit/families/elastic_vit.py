"""Elastic vision transformers: their record. Nobody has released checkpoints of most of these methods for ViTs."""

from ..models import weights_from_vit
from ..models.configuration_elastic_vit import ElasticViTConfig
from ..models.modeling_elastic_vit import ElasticViTForImageClassification, ElasticViTModel
from . import costs_vit
from .record import IMAGE_CLASSIFICATION, TRAINING_FIELDS, CardText, Costs, Family, Paper, PlainSource


# A start may have more heads than the plain ViT, whose weights are the leading ones then.
FIXED_BY_VIT = frozenset({*weights_from_vit.FIXED_FIELDS, *weights_from_vit.SHARED_FIELDS}) - {"num_attention_heads"}

FAMILY = Family(
    name="Elastic ViT",
    config_class=ElasticViTConfig,
    model_class=ElasticViTModel,
    heads={IMAGE_CLASSIFICATION: ElasticViTForImageClassification},
    costs=Costs(sub_networks=costs_vit.sub_network_macs),
    plain=PlainSource("from_vit", FIXED_BY_VIT),
    free_fields=TRAINING_FIELDS | {"default_sub_network", "sub_network_loss_weights"},
    announced_fields=frozenset({"sub_networks"}),
    card=CardText(
        description="""\
An elastic Vision Transformer: one set of weights that contains several smaller networks, of which the user picks one
for each call, by the computation that there is.""",
        limits="A sub-network that was not trained, such as one of mixed MLP widths, may be less accurate.",
        rule="Every image runs the whole of one sub-network. The configuration picks number {default_sub_network}.",
        override="default_sub_network",
    ),
    paper=Paper(
        title="elastic sub-networks (HydraViT, MatFormer, DynaBERT, SortedNet)",
        bibtex="""\
@inproceedings{haberer2024hydravit,
  title     = {HydraViT: Stacking Heads for a Scalable ViT},
  author    = {Haberer, Janek and Hojjat, Ali and Landsiedel, Olaf},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2024}
}
@article{devvrit2023matformer,
  title   = {MatFormer: Nested Transformer for Elastic Inference},
  author  = {Devvrit and others},
  journal = {arXiv preprint arXiv:2310.07707},
  year    = {2023}
}
@inproceedings{hou2020dynabert,
  title     = {DynaBERT: Dynamic BERT with Adaptive Width and Depth},
  author    = {Hou, Lu and Huang, Zhiqi and Shang, Lifeng and Jiang, Xin and Chen, Xiao and Liu, Qun},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2020}
}
@article{valipour2023sortednet,
  title   = {SortedNet: A Scalable and Generalized Framework for Training Modular Deep Neural Networks},
  author  = {Valipour, Mojtaba and others},
  journal = {arXiv preprint arXiv:2309.00255},
  year    = {2023}
}""",
    ),
)
