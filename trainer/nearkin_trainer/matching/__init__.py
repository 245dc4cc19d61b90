"""Location-wise matching of feature maps: the QAConv score, and what it is made of.

sims[b, m, p, q] = <probes[b, :, p] / |.|, classes[candidates[b, m], :, q] / |.|>
maxima[b, m]     = concat(max over q of sims[b, m], max over p of sims[b, m])
score[b, m]      = BatchNorm(Linear(BatchNorm(maxima[b, m])))
"""

from nearkin_trainer.matching.head import QAConv
from nearkin_trainer.matching.operation import location_maxima
from nearkin_trainer.matching.sparse import SparseQAConv, SparseScores

__all__ = ["QAConv", "SparseQAConv", "SparseScores", "location_maxima"]
