def conduct(*a): raise NotImplementedError
