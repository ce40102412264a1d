# Table 2, row 4: cropping and high-frequency corruption. Paper: 40.7.
_base_ = "../_base_/ikd_retinanet_no_flip.py"
model = dict(adv=None)
