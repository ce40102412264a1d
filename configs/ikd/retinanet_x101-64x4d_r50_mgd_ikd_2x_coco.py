# Table 1, RetinaNet: ours (+MGD). Paper: 41.1 COCO val box AP.
_base_ = "../_base_/ikd_retinanet.py"
model = dict(losses=[dict(type="MGDLoss", preset="retinanet", source="neck.fpn_convs.{i}.conv")])
