# Table 2, row 3: adaptive cropping alone, so no noise. Paper: 40.6.
_base_ = "../_base_/ikd_retinanet_no_flip.py"
model = dict(adv=None, augment=dict(noise_prob=0.0))
