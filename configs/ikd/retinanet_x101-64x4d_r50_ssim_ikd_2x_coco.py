# RetinaNet: structural KD and IKD; no published run. Weight 4, of which the paper says that it or 2 is best; all maps of the
# neck.
_base_ = "../_base_/ikd_retinanet.py"
model = dict(losses=[dict(type="SSIMLoss", preset="retinanet")], init_student=False)
