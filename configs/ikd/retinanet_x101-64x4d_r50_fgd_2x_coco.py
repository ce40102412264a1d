# Table 1, RetinaNet: FGD. Paper: 40.7 COCO val box AP.
_base_ = "../_base_/ikd_retinanet.py"
model = dict(adv=None, augment=None, stop_at=None)
