# GFL: CWD on the class head's logits. Published: 41.9 (mmrazor).
_base_ = "./gfl_r101_r50_cwd-logits_ikd_1x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
