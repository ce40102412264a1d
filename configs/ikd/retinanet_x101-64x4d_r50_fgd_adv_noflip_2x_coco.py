# Table 2, row 5: the adversarial features alone. Paper: 40.6.
_base_ = "../_base_/ikd_retinanet_no_flip.py"
model = dict(augment=None)
