# Table 2, row 2: adaptive high-frequency corruption alone, so noise and no crop. Paper: 40.3.
_base_ = "../_base_/ikd_retinanet_no_flip.py"
model = dict(adv=None, augment=dict(crop_prob=0.0))
